// The browser of trees: filters over typed arrays, a list that holds only the rows in view, one tree beside it.
const ROW = 46;
const ORDERS = {
  step: ['by step', null], newest: ['newest step first', null], attacker: ['strongest attack first', ['attacker', -1]], defender: ['worst response first', ['defender', 1]],
};

class TreeBrowser {
  constructor(data, bases) {
    Object.assign(this, { data, bases, matches: new Uint32Array(0), selected: 0, job: 0, rows: new Map() });
    this.offsets = [0];
    for (const base of bases) this.offsets.push(this.offsets[this.offsets.length - 1] + base.count);
    this.total = this.offsets[bases.length];
    this.section = this.build();
  }

  build() {
    const option = (value, label) => h('option', { value }, label);
    const { runs, flags } = this.data;
    const update = () => this.filter();
    this.inputs = {
      text: h('input', { type: 'search', placeholder: 'search text or seed id   ( / )', 'aria-label': 'Search text', oninput: () => { clearTimeout(this.wait); this.wait = setTimeout(update, 200); } }),
      run: h('select', { 'aria-label': 'Run', onchange: update }, option('', 'all runs'), runs.map((run, i) => option(i, run.name))),
      category: h('select', { 'aria-label': 'Category', onchange: update }, option('', 'both categories'), option('0', 'harmful'), option('1', 'benign')),
      flag: h('select', { 'aria-label': 'Outcome', onchange: update }, option('', 'any outcome'), Object.values(flags).map((label, i) => option(1 << i, label))),
      from: h('input', { type: 'number', min: 0, placeholder: 'from', 'aria-label': 'From step', oninput: update }),
      to: h('input', { type: 'number', min: 0, placeholder: 'to', 'aria-label': 'To step', oninput: update }),
      order: h('select', { 'aria-label': 'Order', onchange: update }, Object.entries(ORDERS).map(([key, [label]]) => option(key, label))),
    };
    this.inputs.run.hidden = runs.length < 2;
    this.reveal = h('input', { type: 'checkbox', onchange: () => this.fold(!this.reveal.checked) });
    this.status = h('p', { class: 'status', role: 'status' });
    this.space = h('div', { class: 'space', role: 'presentation' });
    this.list = h('div', { class: 'list', role: 'listbox', tabindex: 0, 'aria-label': 'Trees', onscroll: () => this.draw(), onkeydown: event => this.listKey(event) }, this.space);
    this.detail = h('article', { class: 'detail', 'aria-label': 'Tree', tabindex: -1 });
    new ResizeObserver(() => this.draw()).observe(this.list);
    return h('section', { id: 'trees', 'aria-labelledby': 'trees-title' },
      h('h2', { id: 'trees-title' }, 'Trees'),
      h('p', { class: 'note keys' }, 'Keys: ', h('kbd', {}, 'j'), ' ', h('kbd', {}, 'k'), ' next and previous, ', h('kbd', {}, 'Enter'), ' into the tree, ', h('kbd', {}, '/'), ' search, ', h('kbd', {}, 'Esc'), ' back, ', h('kbd', {}, 'f'), ' fold harmful text.'),
      h('div', { class: 'filters', role: 'search' }, this.inputs.text, this.inputs.run, this.inputs.category, this.inputs.flag,
        h('span', { class: 'steps' }, 'steps ', this.inputs.from, ' to ', this.inputs.to), this.inputs.order,
        h('label', {}, this.reveal, ' show text of harmful seeds'), h('button', { type: 'button', onclick: () => this.clear() }, 'clear')),
      this.status, h('div', { class: 'browser' }, this.list, this.detail));
  }

  // --- what is listed

  place(id) {
    let run = 0;
    while (id >= this.offsets[run + 1]) run++;
    return [run, id - this.offsets[run]];
  }

  filter() {
    const job = ++this.job;
    const { inputs } = this;
    const number = input => (input.value === '' ? null : Number(input.value));
    const run = number(inputs.run), category = number(inputs.category), flag = number(inputs.flag);
    const from = number(inputs.from) ?? 0, to = number(inputs.to) ?? Infinity;
    const found = new Uint32Array(this.total);
    let count = 0;
    this.bases.forEach((base, r) => {
      if ((run !== null && run !== r) || settings.hidden.has(r)) return;
      const { step, flags, category: kind } = base.columns;
      for (let i = 0; i < base.count; i++) {
        if (step[i] >= from && step[i] <= to && (category === null || kind[i] === category) && (flag === null || flags[i] & flag)) {
          found[count++] = this.offsets[r] + i;
        }
      }
    });
    const chosen = this.ordered(found.subarray(0, count), inputs.order.value);
    const needle = inputs.text.value.trim();
    if (needle) this.search(chosen, needle, job);
    else { this.show(chosen); this.tell(`${chosen.length.toLocaleString('en')} of ${this.total.toLocaleString('en')} trees`); }
  }

  ordered(ids, order) {
    if (order === 'newest') return ids.map((_, i) => ids[ids.length - 1 - i]);
    const key = ORDERS[order][1];
    if (!key) return ids;
    const [column, sign] = key;
    const values = new Float32Array(this.total);
    this.bases.forEach((base, r) => values.set(base.columns[column], this.offsets[r]));
    const rank = id => (Number.isNaN(values[id]) ? Infinity : sign * values[id]);
    return ids.slice().sort((a, b) => rank(a) - rank(b) || a - b);
  }

  // Reads chunk after chunk in the order of the list; what was found so far is shown meanwhile.
  async search(ids, needle, job) {
    const wanted = needle.toLowerCase();
    const raw = JSON.stringify(wanted).slice(1, -1);
    const hit = new Uint8Array(this.total);
    const byChunk = new Map();
    for (const id of ids) {
      const [run, row] = this.place(id);
      const key = run * 1e9 + this.bases[run].columns.chunk[row];
      if (!byChunk.has(key)) byChunk.set(key, []);
      byChunk.get(key).push(id);
    }
    let done = 0, shown = performance.now();
    for (const members of byChunk.values()) {
      const [run, row] = this.place(members[0]);
      const base = this.bases[run], chunk = base.columns.chunk[row];
      const lines = await base.lines(chunk);
      if (job !== this.job) return;
      for (const id of members) {
        const line = lines[id - this.offsets[run] - base.starts[chunk]];
        if (line.toLowerCase().includes(raw) && treeSays(JSON.parse(line), wanted)) hit[id] = 1;
      }
      done++;
      if (performance.now() - shown > 150) {
        this.show(ids.filter(id => hit[id]));
        this.tell(`${this.matches.length.toLocaleString('en')} found, ${Math.round(100 * done / byChunk.size)} % searched …`);
        shown = performance.now();
        await new Promise(requestAnimationFrame);
        if (job !== this.job) return;
      }
    }
    this.show(ids.filter(id => hit[id]));
    this.tell(`${this.matches.length.toLocaleString('en')} of ${this.total.toLocaleString('en')} trees hold “${needle}”`);
  }

  tell(words) { this.status.textContent = words; }

  show(ids) {
    const current = this.matches[this.selected];
    this.matches = ids;
    const again = current === undefined ? -1 : ids.indexOf(current);
    this.selected = Math.max(0, again);
    this.space.style.height = `${ids.length * ROW}px`;
    for (const row of this.rows.values()) row.remove();
    this.rows.clear();
    if (again < 0) this.list.scrollTop = 0;
    this.draw();
    if (!ids.length) this.detail.replaceChildren(h('p', { class: 'dim' }, this.total ? 'No tree matches.' : 'This page holds no trees.'));
    else if (again < 0 || !this.detail.firstChild) this.open(false);
  }

  // --- the list

  draw() {
    const first = Math.max(0, Math.floor(this.list.scrollTop / ROW) - 4);
    const last = Math.min(this.matches.length, Math.ceil((this.list.scrollTop + this.list.clientHeight) / ROW) + 4);
    for (const [place, row] of this.rows) if (place < first || place >= last) { row.remove(); this.rows.delete(place); }
    for (let place = first; place < last; place++) if (!this.rows.has(place)) this.addRow(place);
  }

  addRow(place) {
    const [run, row] = this.place(this.matches[place]);
    const { step, category, flags, attacker, defender } = this.bases[run].columns;
    const harmful = category[row] === 0;
    const names = Object.keys(this.data.flags).filter((_, bit) => flags[row] & (1 << bit));
    const reward = value => (Number.isNaN(value) ? '–' : value.toFixed(1).replace('-', '−'));
    const said = h('span', { class: 'preview' });
    const element = h('div', {
      id: `tree-row-${place}`, class: 'row', role: 'option', 'aria-selected': String(place === this.selected),
      'aria-posinset': place + 1, 'aria-setsize': this.matches.length, style: { top: `${place * ROW}px` },
      onclick: () => { this.select(place); this.open(true); },
    },
    this.data.runs.length > 1 && h('span', { class: 'chip', style: { background: this.data.runs[run].colour } }),
    h('span', { class: 'step' }, step[row]),
    h('span', { class: 'middle' }, h('span', { class: 'tags' }, badge(harmful ? 'harmful' : 'benign', harmful ? 'harmful' : 'benign'),
      names.includes('failed') && badge(harmful ? 'attack worked' : 'refused', 'bad'),
      names.some(name => name.startsWith('attack_')) && badge('attack failed', 'plain'),
      names.some(name => name.startsWith('response_')) && badge('response failed', 'plain'),
      names.includes('no_verdict') && badge('verdict missing', 'plain')), said),
    h('span', { class: 'rewards', title: 'best attack reward, lowest response reward' }, `A ${reward(attacker[row])}`, h('br'), `D ${reward(defender[row])}`));
    this.rows.set(place, element);
    this.space.append(element);
    this.bases[run].tree(row).then(tree => {
      said.textContent = harmful && !textShown.harmful ? `folded · seed ${tree.seed.id}` : tree.seed.text;
    }, error => { said.textContent = error.message; });
  }

  select(place) {
    if (!this.matches.length) return;
    this.rows.get(this.selected)?.setAttribute('aria-selected', 'false');
    this.selected = Math.max(0, Math.min(this.matches.length - 1, place));
    const top = this.selected * ROW;
    if (top < this.list.scrollTop) this.list.scrollTop = top;
    else if (top + ROW > this.list.scrollTop + this.list.clientHeight) this.list.scrollTop = top + ROW - this.list.clientHeight;
    this.draw();
    this.rows.get(this.selected)?.setAttribute('aria-selected', 'true');
    this.list.setAttribute('aria-activedescendant', `tree-row-${this.selected}`);
  }

  // --- the tree beside it

  async open(enter) {
    const id = this.matches[this.selected];
    if (id === undefined) return;
    const [run, row] = this.place(id);
    let content;
    try {
      content = treeView(await this.bases[run].tree(row), this.data.runs[run], { sameSeed: seed => this.set({ text: seed }) });
    } catch (error) {
      content = [h('p', { class: 'warning' }, error.message)];
    }
    if (id !== this.matches[this.selected]) return;
    const back = h('button', { type: 'button', class: 'back', onclick: () => this.close() }, '← back to the list');
    this.detail.replaceChildren(back, ...content.flat(Infinity).filter(Boolean));
    this.detail.scrollTop = 0;
    if (enter) {
      this.detail.classList.add('entered');
      document.body.classList.add('reading');
      this.detail.querySelector('h3')?.focus({ preventScroll: true });
      history.replaceState(null, '', `#tree=${run}.${row}`);
    }
  }

  close() {
    this.detail.classList.remove('entered');
    document.body.classList.remove('reading');
    this.list.focus({ preventScroll: true });
  }

  fold(folded) {
    textShown.harmful = !folded;
    this.reveal.checked = !folded;
    for (const row of this.rows.values()) row.remove();
    this.rows.clear();
    this.draw();
    const entered = this.detail.classList.contains('entered');
    this.open(false).then(() => { if (entered) this.detail.querySelector('h3')?.focus({ preventScroll: true }); });
  }

  // --- filters from elsewhere, and keys

  set(values) {
    for (const [name, input] of Object.entries(this.inputs)) if (name !== 'order') input.value = values[name] ?? '';
    this.close();
    this.filter();
  }

  clear() { this.set({}); }

  jump(hash) {
    const found = /^#tree=(\d+)\.(\d+)$/.exec(hash);
    if (!found || !(this.bases[Number(found[1])]?.count > Number(found[2]))) return;
    this.section.scrollIntoView();
    this.select(this.matches.indexOf(this.offsets[Number(found[1])] + Number(found[2])));
    this.open(true);
  }

  listKey(event) {
    const page = Math.max(1, Math.floor(this.list.clientHeight / ROW) - 1);
    const to = { ArrowDown: this.selected + 1, ArrowUp: this.selected - 1, PageDown: this.selected + page, PageUp: this.selected - page, Home: 0, End: this.matches.length - 1 }[event.key];
    if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.select(to);
    this.open(false);
  }

  key(event) {
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) && event.target.type !== 'checkbox';
    if (event.key === 'Escape') {
      if (typing) this.list.focus();
      else if (this.detail.classList.contains('entered')) this.close();
      else if (this.inputs.text.value) this.clear();
      else return;
      event.preventDefault();
      return;
    }
    if (typing && !(event.key === 'Enter' && event.target === this.inputs.text)) return;
    const pressed = /^(BUTTON|A|SUMMARY)$/.test(event.target.tagName);
    if (event.key === '/') {
      this.section.scrollIntoView({ block: 'nearest' });
      this.inputs.text.focus();
      this.inputs.text.select();
    } else if (event.key === 'j' || event.key === 'k') {
      this.section.scrollIntoView({ block: 'nearest' });
      if (!this.detail.classList.contains('entered')) this.list.focus({ preventScroll: true });
      this.select(this.selected + (event.key === 'j' ? 1 : -1));
      this.open(this.detail.classList.contains('entered'));
    } else if (event.key === 'f') this.fold(textShown.harmful);
    else if (event.key === 'Enter' && !pressed && this.section.contains(event.target)) this.open(true);
    else return;
    event.preventDefault();
  }
}

// Whether any text of a tree, or its seed's id, holds the wanted words (lower case).
function treeSays(tree, wanted) {
  const says = value => typeof value === 'string' && value.toLowerCase().includes(wanted);
  return says(tree.seed.text) || says(tree.seed.id) || tree.attacks.some(attack => says(attack.text) || says(attack.raw)
    || attack.responses.some(response => says(response.text) || says(response.raw)));
}
