// Time curves on uPlot. A chart is made again when its set of series changes, and fed otherwise.

const HEIGHT = 190;
const SYNC = uPlot.sync("time");

function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

export const TOTAL = { color: "--ink", width: 2 };
const COLOURS = ["--c1", "--c2", "--c3", "--c4", "--c5", "--c6"];

export class Chart {
  constructor(id, { pick, absent, log = false, range = null, marks = null, digits = 2 }) {
    this.box = document.getElementById(id);
    Object.assign(this, { pick, absent, log, range, marks, digits });
    this.key = null;
    this.plot = null;
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(this.box);
  }

  // history: {t, series}; now: the latest snapshot, or null before the first.
  draw(history, now) {
    const lines = this.pick(history, now);
    const seen = lines.some((line) => line.values.some((value) => value !== null));
    if (!seen || history.t.length < 2) return this.empty(now);
    const key = lines.map((line) => line.label).join("|") + document.documentElement.dataset.theme;
    const data = [history.t, ...lines.map((line) => line.values)];
    this.shaded = this.marks ? this.marks(history) : [];
    if (key !== this.key) this.make(key, lines, data);
    else this.plot.setData(data);
    this.showLast();
  }

  // Without a pointer on the chart its legend shows the latest values.
  showLast() {
    if (this.plot && this.plot.cursor.left < 0) this.plot.setLegend({ idx: this.plot.data[0].length - 1 });
  }

  empty(now) {
    this.destroy();
    const text = document.createElement("div");
    text.className = "absent";
    text.textContent = this.absent(now);
    this.box.replaceChildren(text);
  }

  destroy() {
    if (this.plot) this.plot.destroy();
    this.plot = null;
    this.key = null;
  }

  make(key, lines, data) {
    this.destroy();
    this.box.replaceChildren();
    this.key = key;
    const axis = {
      stroke: css("--muted"), font: "11px system-ui, sans-serif",
      grid: { stroke: css("--grid"), width: 1 }, ticks: { show: false },
    };
    const options = {
      width: Math.max(this.box.clientWidth, 120), height: HEIGHT,
      padding: [8, 24, 0, 0],
      cursor: { sync: { key: SYNC.key }, points: { size: 6 } },
      legend: { live: true },
      scales: { x: { time: true }, y: { distr: this.log ? 3 : 1, range: this.range } },
      axes: [
        { ...axis, space: 70, size: 28, values: times },
        {
          ...axis, size: 46, ...(this.log ? { splits: decades, filter: (_, splits) => splits } : {}),
          values: (_, ticks) => ticks.map((v) => (v === null ? "" : short(v))),
        },
      ],
      series: [
        { label: "time", value: (_, t) => (t === null ? "" : clock(t)) },
        ...lines.map((line, index) => ({
          label: line.label,
          stroke: css(line.color || COLOURS[index % COLOURS.length]),
          width: line.width || 1.5,
          dash: line.dash || null,
          points: { show: false },
          value: (_, v) => (v === null || v === undefined ? "–" : number(v, this.digits)),
        })),
      ],
      hooks: {
        drawClear: [(plot) => this.shade(plot)],
        setCursor: [() => this.showLast()],
      },
    };
    this.plot = new uPlot(options, data, this.box);
  }

  // Spans of time in which the device was slowed.
  shade(plot) {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.fillStyle = css("--shade");
    for (const [from, to] of this.shaded || []) {
      const left = Math.max(bbox.left, plot.valToPos(from, "x", true));
      const right = Math.min(bbox.left + bbox.width, plot.valToPos(to, "x", true));
      if (right > left) ctx.fillRect(left, bbox.top, right - left, bbox.height);
    }
    ctx.restore();
  }

  resize() {
    if (this.plot) this.plot.setSize({ width: Math.max(this.box.clientWidth, 120), height: HEIGHT });
  }
}

function decades(plot) {
  const { min, max } = plot.scales.y;
  const found = [];
  for (let power = Math.ceil(Math.log10(min)); 10 ** power <= max; power += 2) found.push(10 ** power);
  return found;
}

export function number(value, digits = 2) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 100000) return value.toExponential(1).replace("e+", "e");
  if (size >= 100) return value.toFixed(0);
  if (size >= 10) return value.toFixed(Math.min(digits, 1));
  return value.toFixed(digits);
}

function short(value) {
  const size = Math.abs(value);
  if (size >= 10000 || (size > 0 && size < 0.001)) return value.toExponential(0).replace("e+", "e");
  return String(Number(value.toPrecision(6)));
}

export function clock(seconds, withSeconds = true) {
  const options = { hour: "2-digit", minute: "2-digit", hour12: false };
  if (withSeconds) options.second = "2-digit";
  return new Date(seconds * 1000).toLocaleTimeString([], options);
}

function times(plot, ticks) {
  const span = plot.scales.x.max - plot.scales.x.min;
  return ticks.map((t) => clock(t, span < 300));
}
