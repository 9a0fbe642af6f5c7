// A card with a chart: title, legend that shows values at the pointer, drawing that follows its width.
const HEIGHT = 200;
const lazily = new IntersectionObserver(entries => {
  for (const entry of entries) if (entry.isIntersecting) entry.target.drawNow();
}, { rootMargin: '600px' });
const resized = new ResizeObserver(entries => {
  for (const entry of entries) if (entry.target.drawn && entry.target.drawn !== entry.target.clientWidth) entry.target.drawNow();
});
document.addEventListener('settings', () => {
  for (const frame of document.querySelectorAll('.frame')) {
    if (frame.drawn) { frame.drawn = 0; lazily.unobserve(frame); lazily.observe(frame); }
  }
});

// spec: {title, subtitle, lines: [{label, colour, dash, run, steps, values}], ...}; draw(svg, width, shown lines) returns a
// function that shows a step (null: the end) and the steps that can be shown.
function chartCard(spec, draw) {
  const legend = h('ul', { class: 'legend' });
  const frame = h('div', { class: 'frame' });
  const card = h('figure', { class: 'card chart' },
    h('figcaption', {}, spec.title, spec.subtitle && h('span', { class: 'dim' }, ` ${spec.subtitle}`)), legend, frame);
  const outputs = spec.lines.map(line => {
    const value = h('span', { class: 'value' });
    const entry = h('li', {}, swatch(line), ` ${line.label} `, value);
    legend.append(entry);
    return { line, value, entry };
  });
  frame.style.setProperty('height', `${spec.height || HEIGHT}px`);
  frame.drawNow = () => {
    if (!frame.clientWidth || frame.drawn === frame.clientWidth) return;
    frame.drawn = frame.clientWidth;
    const shown = spec.lines.filter(line => !settings.hidden.has(line.run));
    for (const { line, entry } of outputs) entry.hidden = settings.hidden.has(line.run);
    const svg = s('svg', {
      width: frame.drawn, height: spec.height || HEIGHT, role: 'img', tabindex: 0, 'aria-label': spoken(spec, shown),
    });
    frame.replaceChildren(svg);
    if (shown.length) interact(svg, spec, draw(svg, frame.drawn, shown, outputs));
  };
  document.addEventListener('runs-shown', () => { card.hidden = spec.lines.every(line => settings.hidden.has(line.run)); });
  lazily.observe(frame);
  resized.observe(frame);
  return card;
}

function swatch(line) {
  const mark = line.area
    ? s('rect', { width: 12, height: 12, rx: 2, y: 1, style: { fill: line.colour } })
    : s('line', { x1: 0, x2: 18, y1: 7, y2: 7, 'stroke-width': 2.5, 'stroke-dasharray': line.dash, style: { stroke: line.colour } });
  return s('svg', { class: 'swatch', width: line.area ? 12 : 18, height: 14, 'aria-hidden': 'true' }, mark);
}

function spoken(spec, lines) {
  const parts = lines.map(line => `${line.label} from ${number(line.values[0])} to ${number(line.values[line.values.length - 1])}`);
  return `${spec.title}${spec.subtitle ? ` (${spec.subtitle})` : ''}: ${parts.join('; ')}`;
}

// Pointer and arrow keys choose a step; a click, or Enter, asks for its trees.
function interact(svg, spec, { show, steps, stepAt }) {
  let at = null;
  const choose = step => { at = step; show(step); };
  show(null);
  svg.addEventListener('pointermove', event => choose(stepAt(event.offsetX, event.offsetY)));
  svg.addEventListener('pointerleave', () => choose(null));
  svg.addEventListener('blur', () => choose(null));
  svg.addEventListener('click', event => openTrees(spec, stepAt(event.offsetX, event.offsetY)));
  svg.addEventListener('keydown', event => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (move) {
      const place = at === null ? (move > 0 ? 0 : steps.length - 1) : steps.indexOf(at) + move;
      choose(steps[Math.max(0, Math.min(steps.length - 1, place))]);
    } else if (event.key === 'Enter' && at !== null) openTrees(spec, at);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
}

function openTrees(spec, step) {
  if (step !== null) document.dispatchEvent(new CustomEvent('trees-of-step', { detail: { step, run: spec.run } }));
}

function lineChart(spec) {
  return chartCard(spec, (svg, width, lines, outputs) => {
    const box = { left: 46, right: width - 12, top: 8, bottom: HEIGHT - 24 };
    const soft = new Map(lines.map(line => [line, smoothed(line.values)]));
    const ySpan = domain(lines.flatMap(line => line.values), spec.range);
    const steps = [...new Set(lines.flatMap(line => line.steps))].sort((a, b) => a - b);
    const xSpan = [steps[0], Math.max(steps[steps.length - 1], steps[0] + 1)];
    const x = scale(xSpan, box.left, box.right), y = scale(ySpan, box.bottom, box.top);
    drawAxes(svg, box, x, y, xSpan, ySpan);
    for (const step of spec.marks || []) {
      svg.append(s('line', { class: 'mark', x1: x(step), x2: x(step), y1: box.top, y2: box.bottom }));
    }
    const clipped = value => Math.max(box.top - 2, Math.min(box.bottom + 2, y(value)));
    const points = (line, values) => line.steps.map((step, i) => `${x(step).toFixed(1)},${clipped(values[i]).toFixed(1)}`).join(' ');
    for (const line of lines) {
      const style = { stroke: line.colour };
      const averaged = soft.get(line);
      if (averaged) svg.append(s('polyline', { class: 'raw', points: points(line, line.values), style }));
      svg.append(s('polyline', { class: 'line', points: points(line, averaged || line.values), 'stroke-dasharray': line.dash, style }));
      if (line.steps.length <= 40) {
        for (let i = 0; i < line.steps.length; i++) {
          svg.append(s('circle', { cx: x(line.steps[i]), cy: clipped(line.values[i]), r: 2.6, style: { fill: line.colour } }));
        }
      }
    }
    const cross = s('line', { class: 'cross', y1: box.top, y2: box.bottom });
    const label = s('text', { class: 'tick strong', y: box.bottom + 16, 'text-anchor': 'middle' });
    const dots = lines.map(line => s('circle', { r: 4, class: 'dot', style: { fill: line.colour } }));
    const over = s('g', { visibility: 'hidden' }, cross, label, dots);
    svg.append(over);
    const show = step => {
      over.setAttribute('visibility', step === null ? 'hidden' : 'visible');
      if (step !== null) {
        cross.setAttribute('x1', x(step));
        cross.setAttribute('x2', x(step));
        label.setAttribute('x', Math.max(box.left + 20, Math.min(box.right - 24, x(step))));
        label.textContent = `step ${step}`;
      }
      lines.forEach((line, k) => {
        const i = step === null ? line.steps.length - 1 : nearest(line.steps, step);
        const value = (soft.get(line) || line.values)[i];
        outputs.find(output => output.line === line).value.textContent = number(value) + (spec.unit ? ` ${spec.unit}` : '');
        dots[k].setAttribute('cx', x(line.steps[i]));
        dots[k].setAttribute('cy', clipped(value));
      });
    };
    return { show, steps, stepAt: px => steps[nearest(steps, xSpan[0] + (px - box.left) / (box.right - box.left) * (xSpan[1] - xSpan[0]))] };
  });
}
