// Scales and ticks of charts.
function ticks(low, high, about) {
  const rough = (high - low) / about;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(k => k * power).find(k => k >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

// The span to draw: the given range if the data use a good part of it, else what they need of it.
function domain(values, range) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (low > high) [low, high] = range || [0, 1];
  if (range) {
    const wide = range[1] - range[0];
    if (high - Math.max(low, range[0]) >= 0.3 * wide || (range[0] === 0 && high >= 0.4 * wide)) return range;
    if (range[0] < 0) {
      const most = Math.max(Math.abs(low), Math.abs(high), 0.05 * wide);
      return nice(-most, most);
    }
    return nice(range[0], Math.max(high, range[0] + 0.04 * wide));
  }
  if (low > 0 && low < 0.5 * high) low = 0;
  return nice(low, high);
}

function nice(low, high) {
  if (high === 0 && low === 0) return [0, 1];
  if (high - low < 1e-12) [low, high] = [low - Math.max(0.5, Math.abs(low) * 0.1), high + Math.max(0.5, Math.abs(high) * 0.1)];
  const marks = ticks(low, high, 4);
  const step = marks.length > 1 ? marks[1] - marks[0] : high - low;
  return [Math.floor(low / step + 1e-9) * step, Math.ceil(high / step - 1e-9) * step];
}

const scale = ([low, high], from, to) => value => from + (value - low) / (high - low || 1) * (to - from);

// Axis lines and labels into `svg`; `box` = {left, right, top, bottom}.
function drawAxes(svg, box, x, y, xSpan, ySpan) {
  for (const value of ticks(...ySpan, (box.bottom - box.top) / 42)) {
    svg.append(
      s('line', { class: 'grid', x1: box.left, x2: box.right, y1: y(value), y2: y(value) }),
      s('text', { class: 'tick', x: box.left - 6, y: y(value) + 4, 'text-anchor': 'end' }, tickText(value)),
    );
  }
  for (const value of ticks(...xSpan, Math.max(3, Math.min(6, (box.right - box.left) / 80)))) {
    svg.append(s('text', { class: 'tick', x: x(value), y: box.bottom + 16, 'text-anchor': 'middle' }, tickText(value)));
  }
}

function tickText(value) {
  const size = Math.abs(value);
  if (size >= 10000) return `${Number((value / 1000).toPrecision(3))}k`;
  if (size !== 0 && size < 0.001) return value.toExponential(0).replace('e-', 'e−');
  return String(Number(value.toPrecision(4))).replace('-', '−');
}

// Exponential moving average, corrected for its start; few points stay as they are.
const SMOOTH_ABOVE = 60;

function smoothed(values, above = SMOOTH_ABOVE) {
  if (values.length <= above || settings.smooth <= 0) return null;
  let average = 0, weight = 0;
  return values.map(value => {
    average = settings.smooth * average + (1 - settings.smooth) * value;
    weight = settings.smooth * weight + (1 - settings.smooth);
    return average / weight;
  });
}

// The index of the entry of a sorted list that is nearest to a value.
function nearest(sorted, value) {
  let low = 0, high = sorted.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle + 1; else high = middle;
  }
  return low > 0 && value - sorted[low - 1] <= sorted[low] - value ? low - 1 : low;
}
