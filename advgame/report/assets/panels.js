// Panels of charts. One run: a chart's lines have colours. Several: each line gets a chart, runs have colours.
const OUTCOME_COLOURS = {
  ok: 'var(--ok)', length: 'var(--c1)', unparsable: 'var(--c3)', unfaithful: 'var(--c6)',
  'no faithfulness verdict': 'var(--c7)', 'engine failed': 'var(--c4)',
};

function panelSection(panel, runs) {
  const charts = panel.charts.flatMap(chart => chartsOf(chart, runs, panel.key));
  return h('section', { id: panel.key, 'aria-labelledby': `${panel.key}-title` },
    h('h2', { id: `${panel.key}-title` }, panel.title),
    h('p', { class: 'note' }, panel.note),
    charts.length ? h('div', { class: 'grid charts', style: { '--columns': columns(charts.length) } }, charts) : h('p', { class: 'missing' }, `Not available: ${panel.missing}.`));
}

// Columns of a wide page that leave the fewest holes.
const columns = count => (count <= 4 ? Math.max(2, count) : [4, 3].find(n => count % n === 0) || (count % 4 > count % 3 ? 4 : 3));

function chartsOf(chart, runs, panel) {
  if (chart.kind === 'stack') return runs.map(run => stackOf(chart, run, runs.length > 1)).filter(Boolean);
  if (chart.kind === 'path') return pathOf(chart, runs);
  if (runs.length === 1) {
    const run = runs[0];
    const lines = chart.lines.filter(line => run.curves[line.metric]).map((line, i) => lineOf(run, line, runColour(i), DASHES[i % DASHES.length]));
    return lines.length ? [lineChart({ ...chart, lines, run: run.index, marks: marksOf(run, panel) })] : [];
  }
  return chart.lines.map(line => {
    const lines = runs.filter(run => run.curves[line.metric]).map(run => ({ ...lineOf(run, line, run.colour), label: run.name }));
    return lineChart({ ...chart, subtitle: chart.lines.length > 1 ? line.label : '', lines });
  });
}

const DASHES = [null, '7 3', '2 3', '8 3 2 3'];

function lineOf(run, line, colour, dash) {
  const [steps, values] = run.curves[line.metric];
  return { label: line.label, colour, dash, run: run.index, steps, values };
}

// The steps at which the reward-hacking rule held, in the panels where it can be seen.
const marksOf = (run, panel) => (['heldout', 'rewards'].includes(panel) ? run.signs.find(sign => sign.key === 'hacking').steps : []);

function stackOf(chart, run, named) {
  const lines = chart.lines.filter(line => run.curves[line.metric]).map((line, i) => lineOf(run, line, OUTCOME_COLOURS[line.label] || runColour(i)));
  // What never happened needs no entry.
  const seen = lines.filter(line => line.values.some(value => value > 0)).sort((a, b) => (a.label === 'ok') - (b.label === 'ok'));
  return seen.length ? stackChart({ ...chart, lines: seen, subtitle: named ? run.name : '', run: run.index }) : null;
}

function pathOf(chart, runs) {
  const lines = runs.filter(run => chart.lines.every(line => run.curves[line.metric])).map(run => {
    const [first, second] = chart.lines.map(line => lineOf(run, line));
    const down = new Map(second.steps.map((step, i) => [step, second.values[i]]));
    const both = first.steps.map((step, i) => [step, first.values[i]]).filter(([step]) => down.has(step));
    const turned = (line, value) => (line.invert ? 1 - value : value);
    return {
      label: runs.length > 1 ? run.name : 'now at', colour: run.colour, run: run.index, steps: both.map(([step]) => step),
      across: both.map(([, value]) => turned(chart.lines[0], value)),
      values: both.map(([step]) => turned(chart.lines[1], down.get(step))),
    };
  }).filter(line => line.steps.length);
  return lines.length ? [pathChart({ ...chart, lines, names: chart.lines.map(line => line.label) })] : [];
}
