// Data that the page holds as base64 of gzip, unpacked when asked for.
function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

async function unpack(id) {
  const element = document.getElementById(id);
  if (!element) throw new Error(`this page lacks ${id}; it was not written to its end`);
  const stream = new Blob([bytesOf(element.textContent)]).stream().pipeThrough(new DecompressionStream('gzip'));
  return new Response(stream).arrayBuffer();
}

const unpackText = async id => new TextDecoder().decode(await unpack(id));

// The trees of one run: columns of all, text of the few chunks looked at last.
const CHUNKS_KEPT = 40;

class TreeBase {
  static async open(run) {
    const facts = JSON.parse(document.getElementById(`index-${run}`).textContent);
    const base = new TreeBase();
    Object.assign(base, { run, count: facts.count, chunks: facts.chunks, columns: {}, kept: new Map() });
    const types = { Uint32Array, Uint16Array, Uint8Array, Float32Array };
    await Promise.all(Object.entries(facts.types).map(async ([name, type]) => {
      base.columns[name] = new types[type](await unpack(`index-${run}-${name}`));
    }));
    base.starts = new Uint32Array(facts.chunks + 1);
    for (let i = base.count - 1; i >= 0; i--) base.starts[base.columns.chunk[i]] = i;
    base.starts[facts.chunks] = base.count;
    return base;
  }

  // The lines of a chunk (a promise). Kept: the chunks used last.
  lines(chunk) {
    let lines = this.kept.get(chunk);
    if (lines) this.kept.delete(chunk);
    else lines = unpackText(`trees-${this.run}-${chunk}`).then(text => text.split('\n'));
    this.kept.set(chunk, lines);
    if (this.kept.size > CHUNKS_KEPT) this.kept.delete(this.kept.keys().next().value);
    return lines;
  }

  async tree(row) {
    const chunk = this.columns.chunk[row];
    return JSON.parse((await this.lines(chunk))[row - this.starts[chunk]]);
  }
}
