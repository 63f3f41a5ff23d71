// The page: takes pictures and settings to the worker, one request at a time, and shows what comes back.

import { draw } from "./draw.js";
import { inverse, within } from "./homography.js";
import { cameraFrame, closeCamera, example, openCamera, pixelsOf, readPicture } from "./pictures.js";

const CORRECT_PX = 3;
const byId = (id) => document.getElementById(id);
const root = document.documentElement.dataset; // data-state: "loading", "ready", "busy", "error"; tests wait for it

const pictures = {}; // "a", "b" -> canvas
let trueWarp = null; // first picture to second, where it is known
let result = null;
let changed = new Set(); // slots whose picture the worker has not seen
let isRunning = false;
let isWanted = false;
let isLive = false;

// -------------------------------------------------------------------------------------------------------- the worker

const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
const waiting = new Map();
let asked = 0;

worker.onmessage = ({ data }) => {
  const { resolve, reject } = waiting.get(data.id);
  waiting.delete(data.id);
  if (data.error) reject(new Error(data.error));
  else resolve(data.result);
};
worker.onerror = (event) => showProblem(new Error(`The page's worker stopped: ${event.message || "it did not load"}`));

function ask(message, transfer = []) {
  const id = asked++;
  worker.postMessage({ id, ...message }, transfer);
  return new Promise((resolve, reject) => waiting.set(id, { resolve, reject }));
}

async function start() {
  setState("loading");
  const wish = wishOf(new URLSearchParams(location.search));
  const answer = await fetch("model.json").catch(() => null);
  if (!answer?.ok) throw new Error("There is no network here: open this page with superpoint web.");
  const model = await answer.json();
  byId("network").textContent = `${model.name}, ${(model.bytes / 1e6).toFixed(1)} MB`;
  byId("subpixel").checked = model.subpixel;
  byId("matcher").textContent = model.matcher?.name ?? "mutual nearest neighbors";
  for (const one of [model, model.matcher]) if (one) one.url = new URL(one.file, location.href).href;
  const opened = await ask({ kind: "open", model, wish });
  byId("backend").textContent = opened.backend;
  byId("note").textContent = opened.note && `Why not WebGPU: ${opened.note}.`;
  setState("ready");
  say("Ready.");
}

/** What stands behind the address: ?backend=wasm&threads=2. */
function wishOf(query) {
  const [backend, threads] = [query.get("backend") ?? "auto", query.get("threads")];
  if (!["auto", "webgpu", "wasm"].includes(backend)) {
    throw new Error(`?backend=${backend} in the address: expected webgpu, wasm or auto.`);
  }
  if (threads !== null && !/^([1-9]|[1-5]\d|6[0-4])$/.test(threads)) {
    throw new Error(`?threads=${threads} in the address: expected a whole number from 1 to 64.`);
  }
  return { backend, threads: threads && Number(threads) };
}

const started = start();
started.catch(showProblem);

// ------------------------------------------------------------------------------------------------------ the pictures

function setPicture(slot, canvas) {
  if (canvas) pictures[slot] = canvas;
  else delete pictures[slot];
  changed.add(slot);
}

async function showExample() {
  stopCamera();
  const { photo, copy, toPhoto } = await example();
  setPicture("a", photo);
  setPicture("b", copy);
  trueWarp = inverse(toPhoto);
  await refresh();
}

/** Slot and file, one or two. */
async function showFiles(chosen) {
  const read = await Promise.all(chosen.map(async ([slot, file]) => [slot, await readPicture(file)]));
  if (read.some(([slot]) => slot === "b")) stopCamera();
  for (const [slot, canvas] of read) setPicture(slot, canvas);
  trueWarp = null;
  await refresh();
}

async function toggleCamera() {
  if (isLive) return stopCamera();
  byId("camera").disabled = true; // a second press would open a second stream, and nobody would close the first
  try {
    await openCamera(byId("video"));
  } finally {
    byId("camera").disabled = false;
  }
  isLive = true;
  if (trueWarp) setPicture("a", null); // the example's; a picture that was chosen is matched with the camera's
  trueWarp = null;
  showCameraButtons();
  live();
}

async function live() {
  while (isLive) {
    const frame = cameraFrame(byId("video"));
    if (frame && root.state !== "loading") {
      setPicture("b", frame);
      await refresh();
      if (root.state === "error") return stopCamera();
    }
    await new Promise(requestAnimationFrame);
  }
}

function stopCamera() {
  isLive = false;
  closeCamera(byId("video"));
  showCameraButtons();
}

function keepFrame() {
  if (pictures.b) setPicture("a", pictures.b);
}

function showCameraButtons() {
  byId("keep").hidden = !isLive;
  byId("camera").setAttribute("aria-pressed", isLive);
  byId("camera").textContent = isLive ? "Close camera" : "Open camera";
}

// -------------------------------------------------------------------------------------------------------- the result

const threshold = () => Number((10 ** Number(byId("threshold").value)).toPrecision(2));

function options() {
  return {
    threshold: threshold(),
    maxKeypoints: Number(byId("count").value),
    maxSidePx: byId("side").value ? Number(byId("side").value) : null,
    subpixel: byId("subpixel").checked,
    nmsRadiusPx: 4,
    removeBordersPx: 4,
  };
}

/** Asks for a new result; while one is under way, the last wish waits and the ones between are left out. */
async function refresh() {
  if (!isLive) redraw();
  isWanted = true;
  if (isRunning) return;
  isRunning = true;
  try {
    await started;
    while (isWanted) {
      isWanted = false;
      await runOnce();
    }
  } catch (error) {
    showProblem(error);
  } finally {
    isRunning = false;
  }
}

async function runOnce() {
  setState("busy");
  if (!isLive) say("Looking for points…");
  const sent = changed;
  const images = Object.fromEntries([...sent].map((slot) => [slot, pictures[slot] ? pixelsOf(pictures[slot]) : null]));
  changed = new Set();
  const buffers = Object.values(images).filter(Boolean).map((image) => image.rgba);
  const shown = { ...pictures };
  try {
    result = await ask({ kind: "update", images, options: options() }, buffers);
  } catch (error) {
    for (const slot of sent) changed.add(slot); // the worker has not seen these pictures
    forgetResult();
    throw error;
  }
  window.superpoint = { result, options: options(), pictures: shown }; // for tests, and for the browser's console
  byId("problem").hidden = true;
  redraw(shown);
  showFacts();
  setState("ready");
}

function redraw(shown = pictures) {
  const some = Boolean(shown.a || shown.b);
  byId("hint").hidden = some;
  byId("view").hidden = !some;
  byId("stage").classList.toggle("filled", some);
  if (!some) return;
  const lines = draw(byId("view"), shown, changed.size && !isLive ? null : result);
  byId("drawn").textContent = `${lines} lines drawn`;
}

function showFacts() {
  const { features, match, ms } = result;
  const counts = [features.a, features.b].filter(Boolean).map((found) => found.scores.length);
  const agree = match?.agree?.reduce((sum, one) => sum + one, 0) ?? 0;
  const total = match ? match.distances.length : 0;
  byId("keypoints").textContent = counts.join(" and ");
  byId("matches").textContent = match ? total : "–";
  byId("network-ms").textContent = inMs(ms.network);
  byId("decode-ms").textContent = inMs(ms.decode);
  byId("match-ms").textContent = match ? inMs(ms.match) : "–";
  byId("legend").hidden = !match;
  byId("agree-count").textContent = agree;
  byId("other-count").textContent = total - agree;
  const summary = sentence(counts, match, total, agree);
  byId("view").setAttribute("aria-label", summary);
  if (!isLive) say(summary);
  else say(features.a ? "" : "Press Keep this frame, then move the camera: the live picture is matched with it.");
}

/** After an error: the figures of the pictures before would be taken for those of these. */
function forgetResult() {
  result = null;
  redraw();
  byId("legend").hidden = true;
  for (const id of ["keypoints", "matches", "network-ms", "decode-ms", "match-ms"]) byId(id).textContent = "–";
}

function sentence(counts, match, total, agree) {
  if (counts.includes(0)) return `${counts.join(" and ")} keypoints: lower the threshold, or take a picture that shows more.`;
  if (!match) return `${counts[0]} keypoints. A second picture gives matches.`;
  const found = `${counts.join(" and ")} keypoints, ${total} matches`;
  if (trueWarp) {
    const right = within(trueWarp, result.features.a.xy, result.features.b.xy, match.rows, CORRECT_PX);
    const share = total ? (100 * right.reduce((sum, one) => sum + one, 0)) / total : 0;
    return `${found}: ${share.toFixed(0)}% lie within ${CORRECT_PX} px of where the true warp puts them.`;
  }
  if (!total) return `${found}.`;
  return agree ? `${found}: ${agree} agree with one homography.` : `${found}: they agree with no homography.`;
}

const inMs = (ms) => (ms === undefined ? "–" : `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`);

function say(text) {
  if (byId("said").textContent !== text) byId("said").textContent = text;
}

function setState(state) {
  root.state = state;
}

function showProblem(error) {
  byId("problem").textContent = error.message;
  byId("problem").hidden = false;
  say("");
  setState("error");
}

// ------------------------------------------------------------------------------------------------------ the controls

const trying = (action) => async (event) => {
  byId("problem").hidden = true;
  try {
    await action(event);
  } catch (error) {
    showProblem(error);
  }
};

function showSettings() {
  byId("threshold-value").textContent = threshold();
  byId("threshold").setAttribute("aria-valuetext", threshold());
  byId("count-value").textContent = byId("count").value;
}

byId("threshold").value = Math.log10(0.005);
showSettings();
for (const id of ["threshold", "count", "subpixel"]) {
  byId(id).addEventListener("input", () => {
    showSettings();
    if (result) refresh();
  });
}
byId("side").addEventListener("change", () => {
  for (const slot of Object.keys(pictures)) changed.add(slot);
  if (result) refresh();
});
byId("example").addEventListener("click", trying(showExample));
byId("camera").addEventListener("click", trying(toggleCamera));
byId("keep").addEventListener("click", keepFrame);
for (const slot of ["a", "b"]) {
  const input = byId(`file-${slot}`);
  input.addEventListener(
    "change",
    trying(async () => {
      const [file] = input.files;
      input.value = ""; // the same file may be chosen again
      if (file) await showFiles([[slot, file]]);
    }),
  );
}

// Two dropped pictures are the first and the second; one is the second, or the first if there is none yet.
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  byId("stage").classList.add("over");
});
document.addEventListener("dragleave", () => byId("stage").classList.remove("over"));
document.addEventListener(
  "drop",
  trying(async (event) => {
    event.preventDefault();
    byId("stage").classList.remove("over");
    const files = [...event.dataTransfer.files].slice(0, 2);
    if (!files.length) throw new Error("What was dropped is no file: save the picture first, then drop its file.");
    const slots = files.length === 2 ? ["a", "b"] : [pictures.a ? "b" : "a"];
    await showFiles(files.map((file, i) => [slots[i], file]));
  }),
);
new ResizeObserver(() => redraw()).observe(byId("stage"));
