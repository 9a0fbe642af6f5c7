// Elements from plain values. Text only ever goes through textContent: nothing of a run becomes markup.
const SVG = 'http://www.w3.org/2000/svg';

function make(node, props, children) {
  for (const [key, value] of Object.entries(props || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith('on')) node.addEventListener(key.slice(2), value);
    else if (key === 'style') for (const [name, to] of Object.entries(value)) node.style.setProperty(name, to);
    else node.setAttribute(key, value === true ? '' : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return node;
}

const h = (tag, props, ...children) => make(document.createElement(tag), props, children);
const s = (tag, props, ...children) => make(document.createElementNS(SVG, tag), props, children);

function number(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return '–';
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e6)) return value.toExponential(1);
  if (Number.isInteger(value)) return value.toLocaleString('en').replace('-', '−');
  const text = value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : digits);
  return Number(text) === 0 ? text.replace('-', '') : text.replace('-', '−');
}

const percent = value => (value === null || value === undefined ? '–' : `${(100 * value).toFixed(1)} %`);
const runColour = index => `var(--c${index % 8})`;

// What the whole page agrees on; whoever depends on it listens for "settings" on the document.
const settings = { smooth: 0.9, hidden: new Set() };
const changed = () => document.dispatchEvent(new Event('settings'));
const runsChanged = () => { changed(); document.dispatchEvent(new Event('runs-shown')); };
