// Draws the page: overview and charts at once, trees when the whole file is there.
async function main() {
  const data = JSON.parse(document.getElementById('report-data').textContent);
  data.runs.forEach((run, index) => Object.assign(run, { index, colour: runColour(index) }));
  await Promise.all(data.runs.map(async run => { run.curves = JSON.parse(await unpackText(`curves-${run.index}`)); }));

  document.getElementById('top').append(
    h('p', { class: 'kind' }, 'AdvGame report'), h('h1', {}, data.title),
    h('p', { class: 'dim' }, `written ${data.generated.replace('T', ' ').replace('+00:00', ' UTC')} by advgame ${data.version}`), controlledNotice(data));
  const below = { judge: judgeTable, effort: effortTable };
  const sections = data.panels.map(panel => {
    const section = panelSection(panel, data.runs);
    const more = below[panel.key]?.(data);
    if (more) section.append(more);
    return section;
  });
  const trees = h('div', { class: 'waiting' }, h('section', { id: 'trees' }, h('h2', {}, 'Trees'), h('p', { class: 'dim' }, 'reading …')));
  document.getElementById('main').append(overview(data), ...sections, trees, settingsSection(data.runs));
  const links = [['overview', 'Overview'], ...data.panels.map(panel => [panel.key, panel.title.split(' and ')[0]]), ['trees', 'Trees'], ['settings', 'Settings']];
  document.getElementById('nav').append(h('div', { class: 'links' }, links.map(([id, label]) => h('a', { href: `#${id}` }, label))), runLegend(data));
  // A section that a link leads to stands below the bar, however many rows that has.
  const bar = document.getElementById('nav');
  new ResizeObserver(() => { document.documentElement.style.scrollPaddingTop = `${bar.offsetHeight + 8}px`; }).observe(bar);
  document.documentElement.dataset.charts = Math.round(performance.now());

  if (document.readyState === 'loading') await new Promise(done => document.addEventListener('DOMContentLoaded', done, { once: true }));
  const browser = new TreeBrowser(data, await Promise.all(data.runs.map(run => TreeBase.open(run.index))));
  trees.replaceWith(browser.section);
  browser.filter();
  document.addEventListener('keydown', event => browser.key(event));
  document.addEventListener('runs-shown', () => browser.filter());
  document.addEventListener('trees-of-step', event => {
    const { step, run } = event.detail;
    browser.set({ from: step, to: step, run: data.runs.length > 1 && run !== undefined ? run : '' });
    browser.section.scrollIntoView();
  });
  if (location.hash.startsWith('#tree=')) browser.jump(location.hash);
  else if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
  document.documentElement.dataset.ready = Math.round(performance.now());
}

main().catch(error => {
  document.getElementById('main').append(h('p', { class: 'warning' }, `This page could not be drawn: ${error.message}`));
  throw error;
});
