// Two measures against each other: each run's way from its start (open) to its end (filled).
function pathChart(spec) {
  const size = { height: 300 };
  return chartCard({ ...spec, ...size }, (svg, width, lines, outputs) => {
    const box = { left: 52, right: width - 14, top: 12, bottom: size.height - 44 };
    const ways = lines.map(line => {
      const xs = smoothed(line.across, 20) || line.across;
      const ys = smoothed(line.values, 20) || line.values;
      return line.steps.map((step, i) => ({ step, x: xs[i], y: ys[i], line }));
    });
    const points = ways.flat();
    const upTo1 = values => {
      const low = Math.min(...values);
      return [Math.max(0, Math.floor((low - 0.02) * 10) / 10), 1];
    };
    const xSpan = upTo1(points.map(point => point.x)), ySpan = upTo1(points.map(point => point.y));
    const x = scale(xSpan, box.left, box.right), y = scale(ySpan, box.bottom, box.top);
    drawAxes(svg, box, x, y, xSpan, ySpan);
    svg.append(
      s('text', { class: 'tick', x: (box.left + box.right) / 2, y: size.height - 8, 'text-anchor': 'middle' }, `${spec.names[0]} →`),
      s('text', { class: 'tick', transform: `translate(12 ${(box.top + box.bottom) / 2}) rotate(-90)`, 'text-anchor': 'middle' }, `${spec.names[1]} →`),
    );
    for (const way of ways) {
      const colour = way[0].line.colour;
      svg.append(s('polyline', { class: 'line', style: { stroke: colour, opacity: 0.65 }, points: way.map(p => `${x(p.x).toFixed(1)},${y(p.y).toFixed(1)}`).join(' ') }));
      if (way.length <= 40) for (const p of way) svg.append(s('circle', { cx: x(p.x), cy: y(p.y), r: 2.4, style: { fill: colour } }));
      const last = way[way.length - 1];
      svg.append(
        s('circle', { class: 'open', cx: x(way[0].x), cy: y(way[0].y), r: 6, style: { stroke: colour } }),
        s('circle', { cx: x(last.x), cy: y(last.y), r: 6.5, style: { fill: colour } }),
      );
    }
    const dot = s('circle', { class: 'dot', r: 5, visibility: 'hidden' });
    svg.append(dot);
    const steps = [...new Set(points.map(point => point.step))].sort((a, b) => a - b);
    const show = (step, chosen) => {
      dot.setAttribute('visibility', step === null ? 'hidden' : 'visible');
      for (const way of ways) {
        const p = step === null ? way[way.length - 1] : way[nearest(way.map(point => point.step), step)];
        outputs.find(output => output.line === p.line).value.textContent = `step ${p.step}: ${number(p.x)}, ${number(p.y)}`;
        if (step !== null && (!chosen || chosen.line === p.line)) {
          dot.setAttribute('cx', x(p.x));
          dot.setAttribute('cy', y(p.y));
          dot.style.setProperty('fill', p.line.colour);
        }
      }
    };
    let under = null;
    const stepAt = (px, py) => {
      const distance = p => (x(p.x) - px) ** 2 + (y(p.y) - py) ** 2;
      under = points.reduce((best, p) => (distance(p) < distance(best) ? p : best));
      return under.step;
    };
    return { show: step => show(step, under), steps, stepAt };
  });
}
