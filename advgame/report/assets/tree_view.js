// One tree, drawn: seed, attacks, responses, verdicts.
const textShown = { harmful: false };

function treeView(tree, run, on) {
  const folded = tree.category === 'harmful' && !textShown.harmful;
  const attackPair = extremes(tree.attacks);
  return [
    h('header', {},
      h('h3', { tabindex: -1 }, h('span', { class: 'chip', style: { background: run.colour } }), `Step ${tree.step}, tree ${tree.index} `, badge(tree.category, tree.category)),
      h('p', { class: 'dim' }, `run ${run.name} · seed ${tree.seed.id} `, h('button', { type: 'button', onclick: () => on.sameSeed(tree.seed.id) }, 'all trees of this seed'))),
    h('div', { class: 'seed node' }, h('h4', {}, 'Seed'), text(tree.seed.text, folded, 'seed')),
    tree.attacks.map((attack, i) => attackView(attack, i, tree, attackPair, folded)),
    tree.attacks.length > 1 && tree.verdicts.length > 0 && h('div', { class: 'node' }, h('h4', {}, 'Attacker judge'), verdicts(tree.verdicts, 'A')),
  ];
}

function attackView(attack, i, tree, pair, folded) {
  const responsePair = extremes(attack.responses);
  return h('div', { class: 'attack node' },
    h('h4', {}, attack.direct ? 'The seed as it is' : `Attack ${i + 1}`, ' ', itemBadges(attack, i, pair)),
    !attack.direct && itemText(attack, folded, 'attack'),
    h('div', { class: 'responses' }, attack.responses.map((response, j) => h('div', { class: 'response' },
      h('h5', {}, `Response ${j + 1} `, itemBadges(response, j, responsePair, tree.representatives[i] === j)),
      itemText(response, folded, 'response')))),
    attack.verdicts.length > 0 && verdicts(attack.verdicts, 'R'));
}

function itemBadges(item, i, pair, stands) {
  return [
    badge(item.outcome.replaceAll('_', ' '), item.outcome === 'ok' ? 'plain' : 'bad'),
    badge(item.reward === null ? 'no reward' : `reward ${number(item.reward, 2)}`, 'reward'),
    pair && i === pair[0] && badge('chosen', 'chosen'), pair && i === pair[1] && badge('rejected', 'rejected'), stands && badge('stands for the attack', 'plain'),
    h('span', { class: 'dim small' }, item.tokens === null ? '' : ` ${item.tokens} tokens, version ${item.version}`),
  ];
}

const badge = (label, kind) => h('span', { class: `badge ${kind}` }, label);

function itemText(item, folded, what) {
  return [
    item.text === null ? h('p', { class: 'dim' }, 'nothing could be read from it') : text(item.text, folded, what),
    item.raw !== undefined && h('details', { class: 'rawtext' }, h('summary', {}, 'as it was sampled'), text(item.raw, folded, what)),
  ];
}

function text(value, folded, what) {
  const body = h('p', { class: 'said' }, value || ' ');
  return folded ? h('details', { class: 'fold' }, h('summary', {}, `${what} of a harmful seed, ${value.length} characters`), body) : body;
}

// The pair that training makes of siblings: first highest and first lowest reward; none if all are equal.
function extremes(items) {
  const known = items.map((item, i) => [item.reward, i]).filter(([reward]) => reward !== null);
  if (!known.length) return null;
  const best = known.reduce((a, b) => (b[0] > a[0] ? b : a)), worst = known.reduce((a, b) => (b[0] < a[0] ? b : a));
  return best[0] === worst[0] ? null : [best[1], worst[1]];
}

function verdicts(list, letter) {
  return h('ul', { class: 'verdicts' }, list.map(([first, second, scores]) => {
    const alone = first === second;
    if (!scores) return h('li', {}, h('span', {}, alone ? `${letter}${first + 1}` : `${letter}${first + 1} against ${letter}${second + 1}`), badge('no verdict', 'bad'));
    const sides = alone ? [[first, scores[0]]] : [[first, scores[0]], [second, scores[1]]];
    return h('li', {}, sides.map(([side, score]) => h('span', { class: 'score' }, `${letter}${side + 1}`,
      h('span', { class: 'meter', 'aria-hidden': 'true' }, h('span', { style: { width: `${Math.max(0, Math.min(10, score)) * 10}%` } })), number(score, 1))));
  }));
}
