// What stands before the charts: what this page is, the runs, signs of failure, before and after.
const STATES = { alarm: '✖ alarm', look: '! look', fine: '✓ fine', unknown: '? unknown' };

function controlledNotice(data) {
  const purposes = [...new Set(data.runs.map(run => run.purpose))];
  const holdsTrees = data.runs.some(run => run.trees.shown);
  return h('aside', { class: 'controlled', 'aria-label': 'Controlled artifact' },
    h('strong', {}, holdsTrees ? 'Controlled artifact. ' : 'Aggregates only. '),
    holdsTrees
      ? 'This page holds attacks by a trained Attacker, which was optimised to make a language model misbehave. Keep it within the group that the purpose names; text of harmful seeds is folded.'
      : 'This page holds no text of any tree; the runs themselves are controlled artifacts.',
    h('br'), 'Stated purpose: ', purposes.map((purpose, i) => [i ? ' · ' : '', h('em', {}, purpose)]));
}

function runLegend(data) {
  const entries = data.runs.map(run => {
    const box = h('input', {
      type: 'checkbox', checked: true,
      onchange: event => {
        if (event.target.checked) settings.hidden.delete(run.index); else settings.hidden.add(run.index);
        runsChanged();
      },
    });
    return h('label', { class: 'run' }, box, h('span', { class: 'chip', style: { background: run.colour } }), run.name);
  });
  const slider = h('input', {
    type: 'range', min: 0, max: 0.98, step: 0.02, value: settings.smooth,
    oninput: event => { settings.smooth = Number(event.target.value); changed(); },
  });
  return h('div', { class: 'controls' }, data.runs.length > 1 && entries, h('label', { class: 'smooth' }, 'smoothing ', slider));
}

function overview(data) {
  const { runs } = data;
  return h('section', { id: 'overview', 'aria-labelledby': 'overview-title' },
    h('h2', { id: 'overview-title' }, 'Overview'),
    runs.flatMap(run => run.warnings.map(text => h('p', { class: 'warning' }, `${run.name}: ${text}`))),
    h('div', { class: 'grid wide' },
      h('div', { class: 'card' }, h('h3', {}, 'Signs of failure'), runs.map(run => [runs.length > 1 && runHeading(run), signList(run)])),
      h('div', { class: 'card' }, h('h3', {}, 'Before and after'), beforeAfter(runs), runs.length > 1 ? [h('h3', {}, 'Runs'), factTable(runs)] : factList(runs[0]))),
    runs.length > 1 && differences(runs));
}

const runHeading = run => h('h4', {}, h('span', { class: 'chip', style: { background: run.colour } }), run.name);

function signList(run) {
  return h('ul', { class: 'signs' }, run.signs.map(sign => h('li', {},
    h('details', { class: `sign ${sign.state}` },
      h('summary', {}, h('span', { class: 'state' }, STATES[sign.state]), h('span', { class: 'what' }, h('b', {}, sign.title), ' ', sign.text)),
      h('p', {}, h('b', {}, 'Rule: '), sign.rule)))));
}

function table(head, rows, props) {
  return h('div', { class: 'scroll', tabindex: 0, role: 'region', 'aria-label': props.label }, h('table', {},
    h('thead', {}, h('tr', {}, head.map((cell, i) => h('th', { scope: 'col', class: i ? 'n' : '' }, cell)))),
    h('tbody', {}, rows.map(row => h('tr', {}, row.map((cell, i) => (i ? h('td', { class: 'n' }, cell) : h('th', { scope: 'row' }, cell))))))));
}

// One row a measure; a bar from 0 to 1 shows where it went.
function beforeAfter(runs) {
  const labels = [...new Set(runs.flatMap(run => run.summary.map(row => row[0])))];
  if (!labels.length) return h('p', { class: 'missing' }, 'Not available: no run has ended.');
  const rows = labels.map(label => [label, ...runs.map(run => {
    const [, before, after] = run.summary.find(row => row[0] === label) || [];
    const inside = [before, after].filter(value => value !== null && value !== undefined && value >= 0 && value <= 1);
    return [
      h('span', { class: 'dim' }, number(before)), ' → ', h('b', {}, number(after)),
      s('svg', { class: 'mini', viewBox: '0 0 100 8', 'aria-hidden': 'true' },
        s('line', { x1: 0, x2: 100, y1: 4, y2: 4, class: 'grid' }),
        inside.length === 2 && s('line', { x1: 100 * before, x2: 100 * after, y1: 4, y2: 4, 'stroke-width': 2, style: { stroke: run.colour, opacity: 0.5 } }),
        inside.includes(before) && s('circle', { class: 'open', cx: 100 * before, cy: 4, r: 3, style: { stroke: run.colour } }),
        inside.includes(after) && s('circle', { cx: 100 * after, cy: 4, r: 3.4, style: { fill: run.colour } })),
    ];
  })]);
  return table(['', ...runs.map(run => (runs.length > 1 ? run.name : 'before → after'))], rows, { label: 'Before and after' });
}

function factTable(runs) {
  const keys = [...new Set(runs.flatMap(run => run.facts.map(([key]) => key)))];
  const rows = keys.map(key => [key, ...runs.map(run => (run.facts.find(fact => fact[0] === key) || [, ''])[1])]);
  rows.push(['trees', ...runs.map(run => number(run.trees.recorded))]);
  return table(['', ...runs.map(run => (runs.length > 1 ? run.name : ''))], rows, { label: 'Runs' });
}

const factList = run => h('dl', { class: 'facts' }, [...run.facts, ['trees', number(run.trees.recorded)]].map(([key, value]) => h('div', {}, h('dt', {}, key), h('dd', {}, value))));

function differences(runs) {
  const keys = [...new Set(runs.flatMap(run => Object.keys(run.settings)))];
  const shown = value => (value === undefined ? '–' : JSON.stringify(value));
  const rows = keys.filter(key => key !== 'run.name' && new Set(runs.map(run => shown(run.settings[key]))).size > 1)
    .map(key => [h('code', {}, key), ...runs.map(run => shown(run.settings[key]))]);
  return h('div', { class: 'card' }, h('h3', {}, 'Settings that differ'),
    rows.length ? table(['setting', ...runs.map(run => run.name)], rows, { label: 'Settings that differ' }) : h('p', {}, 'None.'));
}

// Tables that belong to a panel of charts.
function judgeTable({ runs }) {
  const rows = runs.flatMap(run => run.judges.map(judge => [
    [h('span', { class: 'chip', style: { background: run.colour } }), runs.length > 1 && `${run.name}: `, `${judge.role}'s judge, ${judge.category}`],
    number(judge.n), number(judge.length_correlation, 2),
    judge.first_minus_second === null ? '–' : `${number(judge.first_minus_second, 2)} ± ${number(judge.standard_error, 2)}`,
    percent(judge.ties), histogram(judge.scores, run.colour),
  ]));
  if (!rows.length) return null;
  return h('div', { class: 'card' }, table(
    ['verdicts of the', 'comparisons', 'r (score, length)', 'first − second ± s.e.', 'ties', 'scores 0 to 10'], rows, { label: 'Judges' }));
}

function histogram(counts, colour) {
  const most = Math.max(...counts) || 1;
  const total = counts.reduce((sum, count) => sum + count, 0) || 1;
  const text = counts.map((count, score) => `${score}: ${Math.round(100 * count / total)} %`).join(', ');
  return s('svg', { class: 'histogram', viewBox: '0 0 110 26', role: 'img', 'aria-label': `scores: ${text}` }, s('title', {}, text),
    counts.map((count, i) => s('rect', { x: i * 10 + 1, width: 8, y: 24 - 23 * count / most, height: 1 + 23 * count / most, style: { fill: colour } })));
}

function effortTable({ runs, stages }) {
  const clock = value => (value === undefined ? '–' : value >= 5400 ? `${(value / 3600).toFixed(2)} h` : value >= 90 ? `${(value / 60).toFixed(1)} min` : `${value.toFixed(1)} s`);
  const measured = [...new Set(runs.flatMap(run => Object.keys(run.seconds)))].filter(key => key !== 'seconds/step');
  const rank = key => (stages.includes(key) ? stages.indexOf(key) : stages.length);
  const cell = (run, key) => {
    const seconds = run.seconds[key], all = run.seconds['seconds/step'];
    const share = stages.includes(key) && all && seconds !== undefined && h('span', { class: 'dim' }, ` ${percent(seconds / all)}`);
    return [clock(seconds), share];
  };
  const label = key => key.replace('seconds/', '').replace('/', ', ');
  const rows = measured.sort((a, b) => rank(a) - rank(b)).map(key => [label(key), ...runs.map(run => cell(run, key))]);
  rows.push(['all', ...runs.map(run => h('b', {}, clock(run.seconds['seconds/step'])))]);
  const energy = [...new Set(runs.flatMap(run => Object.keys(run.energy)))];
  for (const key of energy) rows.push([key, ...runs.map(run => number(run.energy[key]))]);
  return h('div', { class: 'card' }, table(['time by stage', ...runs.map(run => (runs.length > 1 ? run.name : ''))], rows, { label: 'Time by stage' }),
    !energy.some(key => key.endsWith('(J)')) && h('p', { class: 'missing' }, 'Energy is not available: the metrics hold none.'));
}

function settingsSection(runs) {
  return h('section', { id: 'settings', 'aria-labelledby': 'settings-title' }, h('h2', { id: 'settings-title' }, 'Settings'),
    runs.map(run => h('details', { class: 'card' }, h('summary', {}, `config.yaml of ${run.name}`), h('pre', {}, run.config))));
}
