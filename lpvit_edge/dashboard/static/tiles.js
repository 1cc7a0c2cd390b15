// Tiles and lists. Text only ever enters as textContent.

import { clock, number } from "./charts.js";

const $ = (id) => document.getElementById(id);
const QUALITY = { measured: "good", summed: "good", estimated: "warn", suspect: "bad", unavailable: "bad" };
const SCOPE = {
  module_input: "module input", board_input: "whole board", module: "module, sum of rails",
  gpu_board: "GPU board", cpu_package: "CPU package", rail: "one rail",
};

function text(id, value) {
  $(id).textContent = value ?? "";
}

function element(tag, className, content) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.textContent = content;
  return made;
}

export function showTiles({ now }) {
  const name = now.device.board || now.device.cpu || "this device";
  text("device", [name, now.device["power mode"]].filter(Boolean).join(" · "));
  text("engine", now.engine ? `${now.engine.engine} · ${now.engine.precision} · model ${now.engine.model}` : "no line is running");
  document.title = now.power.total_w !== null && !now.power.stale ? `${number(now.power.total_w)} W · lpvit` : "lpvit dashboard";
  showPower(now.power);
  showEnergy(now.energy);
  showLatency(now);
  showFrames(now.frames);
  showDrift(now);
}

function showPower(power) {
  const tile = $("tile-power");
  const known = power.total_w !== null;
  tile.classList.toggle("stale", power.stale);
  tile.classList.toggle("none", !known);
  text("power", known ? number(power.total_w) : "not measured");
  tile.querySelector("small").hidden = !known;
  const badge = $("power-quality");
  badge.textContent = power.stale ? "stale" : power.quality;
  badge.className = `badge ${power.stale ? "bad" : QUALITY[power.quality] || ""}`;
  text("power-scope", known ? SCOPE[power.scope] || power.scope : "");
  const energy = power.energy_j === null ? "" : `${joules(power.energy_j)} since the start`;
  const gap = power.energy_gap_s > 0 ? `, ${number(power.energy_gap_s, 0)} s not counted` : "";
  text("power-note", known ? [power.sensor, energy + gap].filter(Boolean).join(" · ") : power.reason);
}

function joules(value) {
  return value >= 36000 ? `${number(value / 3600)} Wh` : `${number(value)} J`;
}

function showEnergy(energy) {
  const known = energy.gross_j !== null;
  $("tile-energy").classList.toggle("none", !known);
  const small = known && energy.gross_j < 1;
  text("gross", known ? number(small ? energy.gross_j * 1000 : energy.gross_j) : "not known");
  text("gross-unit", known ? (small ? "mJ" : "J") : "");
  const parts = [["model", energy.model_j], ["idle", energy.idle_j], ["capture, rest", energy.capture_j]];
  const shown = known ? parts.filter(([, value]) => value !== null) : [];
  $("energy-parts").replaceChildren(...shown.flatMap(([part, value]) => [
    element("b", "", `${number(value * 1000)} mJ`), element("span", "muted", part),
  ]));
  text("energy-note", energy.reason);
}

function showLatency({ latency, frames }) {
  text("p50", latency ? number(latency.p50_ms) : "–");
  const p999 = latency && latency.p999_ms !== null ? ` · p99.9 ${number(latency.p999_ms)}` : "";
  text("tail", latency ? `p99 ${number(latency.p99_ms)}${p999} ms` : frames ? "waiting for the first frame" : "no line is running");
  const stages = latency ? Object.entries(latency.stages_p50_ms) : [];
  text("stages", stages.map(([stage, ms]) => `${stage} ${number(ms)}`).join(" · "));
}

function showFrames(frames) {
  text("fps", frames ? number(frames.per_s, 1) : "–");
  text("frames", frames ? `${frames.total.toLocaleString()} since the start` : "no line is running");
  const old = frames && frames.age_s > 5 ? `last frame ${number(frames.age_s, 0)} s ago` : "";
  text("dropped", frames ? [`${frames.dropped.toLocaleString()} dropped`, old].filter(Boolean).join(" · ") : "");
  const verdicts = frames ? frames.verdicts : {};
  const total = Object.values(verdicts).reduce((sum, count) => sum + count, 0);
  text("rejects", total ? `${number((100 * (verdicts.reject || 0)) / total, 1)} %` : "–");
  $("verdict-bar").replaceChildren(...["ok", "reject", "safe"].filter((v) => verdicts[v]).map((v) => {
    const part = element("i", v, "");
    part.style.width = `${(100 * verdicts[v]) / total}%`;
    part.title = `${v}: ${verdicts[v]}`;
    return part;
  }));
  text("verdicts", Object.entries(verdicts).map(([v, count]) => `${v} ${count.toLocaleString()}`).join(" · "));
}

function showDrift(now) {
  const { drift } = now;
  $("tile-drift").className = `tile ${drift ? drift.level : "none"}`;
  text("drift", drift ? { green: "none", yellow: "yellow", red: "red" }[drift.level] || drift.level : "not watched");
  text("drift-text", drift ? drift.text || "frames look like those the engine was checked on" : now.drift_reason);
  const missed = drift && drift.not_watched ? ` · ${drift.not_watched.toLocaleString()} not looked at` : "";
  text("drift-note", drift ? `distance ${number(drift.distance)} · ${number(100 * drift.strange_share, 1)} % strange${missed}` : "");
}

export function showLists({ now, fleet }) {
  showShadow(now);
  const facts = { ...now.device, ...(now.engine || {}) };
  pairs("identity", Object.entries(facts));
  $("events").replaceChildren(...(now.events.length ? [...now.events].reverse().map(event) : [element("li", "muted", "none so far")]));
  const own = now.own_cpu_share === null ? "" : `this process takes ${number(100 * now.own_cpu_share, 1)} % of one core ·`;
  text("own", own);
  $("fleet-section").hidden = fleet.length === 0;
  $("fleet").replaceChildren(...fleet.map(device));
}

function pairs(id, entries) {
  $(id).replaceChildren(...entries.flatMap(([name, value]) => [element("dt", "", name), element("dd", "", value)]));
}

function showShadow(now) {
  const { shadow } = now;
  if (!shadow) {
    $("shadow").replaceChildren(element("p", "", now.shadow_reason));
    return;
  }
  const share = shadow.compared ? `${number((100 * shadow.agreed) / shadow.compared, 2)} %` : "none compared yet";
  pairs("shadow", [
    ["agreement", share],
    ["compared", shadow.compared.toLocaleString()],
    ["escapes", `${shadow.escapes.toLocaleString()} (passed here, rejected by the dense engine)`],
    ["overkills", `${shadow.overkills.toLocaleString()} (rejected here, passed by the dense engine)`],
    ["another class", shadow.other.toLocaleString()],
    ["no time for", shadow.dropped.toLocaleString()],
    ...(shadow.failed ? [["failed", `${shadow.failed} (${shadow.reason})`]] : []),
  ]);
}

function event(entry) {
  const item = document.createElement("li");
  const kind = { alarm: "bad", warning: "warn" }[entry.severity] || "";
  const badge = element("span", "", "");
  badge.append(element("span", `badge ${kind}`, entry.kind));
  item.append(element("time", "", clock(entry.at)), badge, element("span", "", entry.text));
  return item;
}

function device(found) {
  const box = element("div", "device", "");
  const link = element("b", "", found.name || found.url);
  const facts = [
    found.power_w === null ? "no power" : `${number(found.power_w)} W`,
    found.frames_per_s === null ? null : `${number(found.frames_per_s, 1)} frames/s`,
    found.drift_level ? `drift ${found.drift_level}` : null,
  ].filter(Boolean).join(" · ");
  box.append(link, element("div", "muted", found.url), element("div", "", found.error || facts));
  return box;
}
