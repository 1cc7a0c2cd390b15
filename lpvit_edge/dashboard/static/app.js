// The page: one stream of snapshots in, tiles and curves out. Nothing is sent back.

import { Chart, TOTAL, clock, number } from "./charts.js";
import { showLists, showTiles } from "./tiles.js";

const SPANS = { "10m": { step: 1, cells: 600 }, "3h": { step: 10, cells: 1080 }, "24h": { step: 60, cells: 1440 } };
const state = { span: "10m", history: { t: [], series: {} }, envelope: null, frozen: false, heard: 0, fetched: 0 };
const $ = (id) => document.getElementById(id);

function values(history, name) {
  return history.series[name] || history.t.map(() => null);
}

function line(history, name, label, style = {}) {
  return { label, values: values(history, name), ...style };
}

function prefixed(history, prefix) {
  return Object.keys(history.series).filter((name) => name.startsWith(prefix));
}

function throttled(history) {
  const flags = values(history, "throttled");
  const spans = [];
  history.t.forEach((t, i) => {
    if (!flags[i]) return;
    const last = spans[spans.length - 1];
    if (last && last[1] >= t - SPANS[state.span].step * 1.5) last[1] = t + SPANS[state.span].step;
    else spans.push([t, t + SPANS[state.span].step]);
  });
  return spans;
}

function scaled(history, name, factor, label, style = {}) {
  const scaledValues = values(history, name).map((v) => (v === null ? null : v * factor));
  return { label, values: scaledValues, ...style };
}

function driftLines(history, now) {
  const evidence = values(history, "drift").map((v) => (v === null ? null : Math.max(v, 1)));
  if (!now || !now.drift) return [{ label: "evidence", values: evidence }];
  const level = (value) => history.t.map(() => value);
  return [
    { label: "evidence", values: evidence, color: "--c1", width: 2 },
    { label: "yellow", values: level(now.drift.yellow_at), color: "--warn", dash: [6, 4], width: 1 },
    { label: "red", values: level(now.drift.red_at), color: "--bad", dash: [6, 4], width: 1 },
  ];
}

const fromZero = (_, min, max) => [0, max > 0 ? max * 1.08 : 1];
const noLine = "no line is running on this device";
const noFrame = (now) => (now && now.frames ? "waiting for the first frame" : noLine);
const charts = [
  new Chart("chart-power", {
    pick: (h) => [
      line(h, "power", "total", TOTAL),
      ...prefixed(h, "rail ").map((name) => line(h, name, name.slice(5))),
    ],
    absent: (now) => (now ? now.power.reason || "waiting for the second reading" : "waiting"),
    range: fromZero, marks: throttled,
  }),
  new Chart("chart-latency", {
    pick: (h) => [
      line(h, "p50", "p50", { color: "--c1", width: 2 }),
      line(h, "p99", "p99", { color: "--c3" }),
      line(h, "p999", "p99.9", { color: "--c5" }),
    ],
    absent: (now) => (now && now.latency ? "waiting for the second reading" : noFrame(now)),
    range: fromZero,
  }),
  new Chart("chart-drift", {
    pick: driftLines, log: true, digits: 1, range: (_, min, max) => [1, Math.max(1e8, max)],
    absent: (now) => (now && now.drift_reason) || noLine,
  }),
  new Chart("chart-energy", {
    pick: (h) => [
      scaled(h, "gross", 1000, "gross", TOTAL),
      scaled(h, "idle", 1000, "idle", { color: "--c6" }),
      scaled(h, "model", 1000, "model", { color: "--c1" }),
      scaled(h, "capture", 1000, "capture and rest", { color: "--c3" }),
    ].filter((l) => l.values.some((v) => v !== null)),
    absent: (now) => (now && now.energy.reason) || "waiting",
    range: fromZero,
  }),
  new Chart("chart-temperature", {
    pick: (h) => prefixed(h, "temp ").map((name) => line(h, name, name.slice(5))),
    absent: () => "no temperature sensor can be read on this device",
    marks: throttled, digits: 1,
  }),
  new Chart("chart-agreement", {
    pick: (h) => [scaled(h, "agreement", 100, "agreement", { color: "--c2", width: 2 })],
    absent: (now) => (now && now.shadow_reason) || noLine,
    digits: 2, range: (_, min) => [Math.min(Math.floor(min) - 1, 95), 100.2],
  }),
];

function drawCharts() {
  for (const chart of charts) chart.draw(state.history, state.envelope && state.envelope.now);
}

async function fetchHistory() {
  const span = state.span;
  const answer = await fetch(`/api/history?span=${span}`);
  if (!answer.ok || span !== state.span) return;
  const found = await answer.json();
  state.history = { t: found.t, series: found.series };
  state.fetched = Date.now();
  if (!state.frozen) drawCharts();
}

// The snapshot's numbers, named as the server's history names them.
function numbersOf(now) {
  const found = {};
  if (!now.power.stale) {
    found.power = now.power.total_w;
    for (const [rail, watts] of Object.entries(now.power.rails_w)) found[`rail ${rail}`] = watts;
  }
  if (now.latency) {
    found.p50 = now.latency.p50_ms; found.p99 = now.latency.p99_ms; found.p999 = now.latency.p999_ms;
  }
  if (now.frames) found.fps = now.frames.per_s;
  for (const part of ["gross", "idle", "model", "capture"]) found[part] = now.energy[`${part}_j`];
  if (now.drift) found.drift = Math.max(...Object.values(now.drift.evidence));
  if (now.shadow && now.shadow.compared) found.agreement = now.shadow.agreed / now.shadow.compared;
  for (const [zone, celsius] of Object.entries(now.temperatures_c)) found[`temp ${zone}`] = celsius;
  if (now.throttling) found.throttled = now.throttling.length ? 1 : 0;
  return found;
}

function append(now) {
  const { t, series } = state.history;
  const at = Math.floor(now.at);
  if (t.length && at < t[t.length - 1] - 5) return void fetchHistory();  // the clock was set back
  if (t.length && at <= t[t.length - 1]) return;
  const gap = t.length && at - t[t.length - 1] > 3;
  const numbers = numbersOf(now);
  for (const name of Object.keys(numbers)) {
    if (!(name in series) && numbers[name] !== null) series[name] = t.map(() => null);
  }
  if (gap) { t.push(at - 1); for (const name of Object.keys(series)) series[name].push(null); }
  t.push(at);
  for (const name of Object.keys(series)) series[name].push(numbers[name] ?? null);
  while (t.length && t[0] < at - SPANS["10m"].cells) {
    t.shift();
    for (const name of Object.keys(series)) series[name].shift();
  }
}

function hear(envelope) {
  state.envelope = envelope;
  state.heard = Date.now();
  const span = SPANS[state.span];
  if (state.span === "10m") append(envelope.now);
  else if (Date.now() - state.fetched > span.step * 1000) fetchHistory();
  if (state.frozen) return;
  showTiles(envelope);
  showLists(envelope);
  showBanners();
  drawCharts();
}

function banner(kind, text) {
  const box = document.createElement("div");
  box.className = `banner ${kind}`;
  box.textContent = text;
  return box;
}

function showBanners() {
  const shown = [];
  const { envelope } = state;
  if (state.heard && Date.now() - state.heard > 4000) {
    shown.push(banner("bad", `Nothing has come from this device since ${clock(state.heard / 1000)}; what you see is old.`));
  }
  if (envelope) {
    const { power, drift, throttling } = envelope.now;
    if (envelope.error) shown.push(banner("bad", `The device shown does not answer: ${envelope.error}`));
    if (power.stale) {
      shown.push(banner("warn", `Stale sensor: ${power.source} has said nothing new for ${number(power.age_s, 0)} s (${power.reason}). Power is unknown, not ${number(power.total_w)} W.`));
    }
    if (drift && drift.level !== "green") {
      shown.push(banner(drift.level === "red" ? "bad" : "warn", `Drift, ${drift.level}: ${drift.text}`));
    }
    if (throttling && throttling.length) shown.push(banner("warn", `The device is slowed by: ${throttling.join(", ")}`));
  }
  $("banners").replaceChildren(...shown);
}

function showLink() {
  const lost = !state.heard || Date.now() - state.heard > 4000;
  const text = state.frozen ? "frozen" : lost ? (state.heard ? "lost" : "connecting") : "live";
  $("link").textContent = text;
  $("link").className = `dot ${lost && state.heard ? "lost" : lost || state.frozen ? "" : "live"}`;
  if (!state.frozen) showBanners();
}

function chooseTheme(theme) {
  document.documentElement.dataset.theme = theme;
  drawCharts();
}

for (const button of document.querySelectorAll("[data-span]")) {
  button.addEventListener("click", () => {
    state.span = button.dataset.span;
    for (const other of document.querySelectorAll("[data-span]")) {
      other.setAttribute("aria-pressed", String(other === button));
    }
    fetchHistory();
  });
}
$("freeze").addEventListener("click", () => {
  state.frozen = !state.frozen;
  $("freeze").setAttribute("aria-pressed", String(state.frozen));
  document.body.classList.toggle("frozen", state.frozen);
  if (!state.frozen && state.envelope) hear(state.envelope);
  showLink();
});
$("theme").addEventListener("click", () => {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  localStorage.setItem("theme", theme);
  chooseTheme(theme);
});
const dark = matchMedia("(prefers-color-scheme: dark)");
dark.addEventListener("change", () => { if (!localStorage.getItem("theme")) chooseTheme(dark.matches ? "dark" : "light"); });
chooseTheme(localStorage.getItem("theme") || (dark.matches ? "dark" : "light"));

fetchHistory().finally(() => {
  const stream = new EventSource("/api/stream");
  stream.onmessage = (message) => hear(JSON.parse(message.data));
  stream.onopen = () => { if (state.heard && Date.now() - state.heard > 4000) fetchHistory(); };
});
setInterval(showLink, 1000);
