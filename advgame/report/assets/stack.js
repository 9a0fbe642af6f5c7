// Shares or amounts over the steps, added up: columns of at most so many spans of steps.
const COLUMNS = 120;

// Shares: what went well fills the rest, and the scale ends where the failures have room.
function ceiling(spec, heights) {
  const failed = spec.lines.map((line, k) => (line.label === 'ok' ? [] : heights[k])).filter(height => height.length);
  const most = failed.length ? Math.max(...failed[0].map((_, i) => failed.reduce((sum, height) => sum + height[i], 0))) : 1;
  return [0.02, 0.05, 0.1, 0.2, 0.5].find(top => top >= 1.25 * most) || 1;
}

function stackChart(spec) {
  const all = [...new Set(spec.lines.flatMap(line => line.steps))].sort((a, b) => a - b);
  const size = Math.ceil(all.length / COLUMNS);
  const spans = [];
  for (let i = 0; i < all.length; i += size) spans.push(all.slice(i, i + size));
  const at = spec.lines.map(line => new Map(line.steps.map((step, i) => [step, line.values[i]])));
  // Absent is nothing: a counter appears with its first event.
  const heights = spec.lines.map((_, k) => spans.map(span => span.reduce((sum, step) => sum + (at[k].get(step) || 0), 0) / span.length));
  for (const line of spec.lines) line.area = true;

  return chartCard(spec, (svg, width, lines, outputs) => {
    const box = { left: 46, right: width - 12, top: 8, bottom: HEIGHT - 24 };
    const totals = spans.map((_, i) => heights.reduce((sum, height) => sum + height[i], 0));
    const ySpan = spec.range ? [0, ceiling(spec, heights)] : nice(0, Math.max(...totals) || 1);
    const xSpan = [all[0], all[all.length - 1] + 1];
    const x = scale(xSpan, box.left, box.right), y = scale(ySpan, box.bottom, box.top);
    drawAxes(svg, box, x, y, xSpan, ySpan);
    spans.forEach((span, i) => {
      let floor = 0;
      const left = x(span[0]);
      const right = i + 1 < spans.length ? x(spans[i + 1][0]) : box.right;
      spec.lines.forEach((line, k) => {
        const value = heights[k][i];
        const top = y(Math.min(ySpan[1], floor + value));
        if (value > 0) {
          svg.append(s('rect', {
            class: 'column', x: left.toFixed(2), width: (right - left + 0.3).toFixed(2), y: top.toFixed(2),
            height: Math.max(0, y(floor) - top).toFixed(2), style: { fill: line.colour },
          }));
        }
        floor += value;
      });
    });
    const cross = s('line', { class: 'cross', y1: box.top, y2: box.bottom });
    const label = s('text', { class: 'tick strong', y: box.bottom + 16, 'text-anchor': 'middle' });
    const over = s('g', { visibility: 'hidden' }, cross, label);
    svg.append(over);
    const middles = spans.map(span => span[span.length >> 1]);
    const show = step => {
      const i = step === null ? spans.length - 1 : nearest(middles, step);
      over.setAttribute('visibility', step === null ? 'hidden' : 'visible');
      if (step !== null) {
        cross.setAttribute('x1', x(middles[i]));
        cross.setAttribute('x2', x(middles[i]));
        label.setAttribute('x', Math.max(box.left + 20, Math.min(box.right - 24, x(middles[i]))));
        label.textContent = `step ${middles[i]}`;
      }
      spec.lines.forEach((line, k) => {
        const value = heights[k][i];
        outputs[k].value.textContent = spec.range ? percent(value) : number(value) + (spec.unit ? ` ${spec.unit}` : '');
      });
    };
    return { show, steps: middles, stepAt: px => middles[nearest(middles, xSpan[0] + (px - box.left) / (box.right - box.left) * (xSpan[1] - xSpan[0]))] };
  });
}
