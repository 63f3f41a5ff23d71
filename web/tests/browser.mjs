// Uses the page as a person would, in a headless browser, and prints what it saw as JSON, for tests/web/test_browser.py:
// node browser.mjs SCENARIO SETTINGS, settings {browser, address, folder, flags, pictures} as JSON; browser is an executable.

import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";

import puppeteer from "puppeteer-core";

const WAIT = { timeout: 120_000 }; // a busy machine takes its time to start a browser
const CHROMIUM = [
  "--no-sandbox",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];
const DESKTOP = { width: 1280, height: 900, deviceScaleFactor: 1 };
const PHONE = { width: 400, height: 800, deviceScaleFactor: 2 }; // isMobile would load the page again

const scenario = process.argv[2];
const { browser: executablePath, address, folder, flags = [], pictures: names = [] } = JSON.parse(process.argv[3]);
const file = (name) => join(folder, name);

const seen = { requests: [], complaints: [] };
const isFirefox = executablePath.includes("firefox");
const browser = await puppeteer.launch({
  browser: isFirefox ? "firefox" : "chrome",
  executablePath,
  headless: true,
  ...WAIT,
  args: isFirefox ? flags : [...CHROMIUM, ...flags],
});
const page = await browser.newPage();
page.setDefaultTimeout(WAIT.timeout);
page.setDefaultNavigationTimeout(WAIT.timeout);
page.on("request", (request) => seen.requests.push(request.url()));
page.on("pageerror", (error) => seen.complaints.push(error.message));
page.on("console", (line) => line.type() === "error" && seen.complaints.push(line.text()));
await page.setViewport(DESKTOP);

const scenarios = { pictures, dropped, keyboard, camera, refusedCamera, badPictures, noNumbers, badAddress, missingNetwork, speed };
try {
  Object.assign(seen, await scenarios[scenario]());
} finally {
  await browser.close();
}
console.log(JSON.stringify(seen));

// ------------------------------------------------------------------------------------------------------ what is done

async function pictures() {
  await open();
  await afterwards(async () => (await page.$("#file-a")).uploadFile(file("a.png")));
  await afterwards(async () => (await page.$("#file-b")).uploadFile(file("b.png")));
  const desktop = await look("desktop.png");
  await page.setViewport(PHONE);
  const phone = await look("phone.png");
  const isolated = await page.evaluate(() => window.crossOriginIsolated);
  return { ...(await found()), desktop, phone, isolated };
}

/** Drops two JPEG files at once. */
async function dropped() {
  await open();
  const files = ["a.jpg", "b.jpg"].map((name) => [name, readFileSync(file(name)).toString("base64")]);
  await afterwards(() =>
    page.evaluate((files) => {
      const dataTransfer = new DataTransfer();
      for (const [name, text] of files) {
        const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
        dataTransfer.items.add(new File([bytes], name, { type: "image/jpeg" }));
      }
      document.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true }));
    }, files),
  );
  return found();
}

async function keyboard() {
  await open();
  await page.keyboard.press("Tab");
  await afterwards(() => page.keyboard.press("Enter"));
  const example = await found();
  await look("example.png");
  await page.setViewport(PHONE);
  await look("example-phone.png");
  await page.setViewport(DESKTOP);
  await page.focus("#threshold");
  await afterwards(() => page.keyboard.press("End"));
  const strong = await found();
  await afterwards(() => page.keyboard.press("Home"));
  await page.focus("#count");
  await afterwards(() => page.keyboard.press("Home"));
  const fewer = await found();
  await page.focus("#subpixel");
  await afterwards(() => page.keyboard.press("Space"));
  const whole = await found();
  const reached = [];
  await page.focus("#example");
  for (let k = 0; k < 8; k++) {
    reached.push(await page.evaluate(() => document.activeElement.id));
    await page.keyboard.press("Tab");
  }
  return { example, fewer, strong, whole, reached };
}

/** The button is pressed twice: one stream is opened. */
async function camera() {
  await open();
  await page.evaluate(() => {
    const { mediaDevices } = navigator;
    const openStream = mediaDevices.getUserMedia.bind(mediaDevices);
    window.streams = 0;
    mediaDevices.getUserMedia = (wish) => openStream(wish, ++window.streams);
  });
  await afterwards(() =>
    page.$eval("#camera", (button) => {
      button.click();
      button.click();
    }),
  );
  const alone = await found();
  await page.click("#keep");
  await page.waitForFunction(() => window.superpoint?.result.match, WAIT);
  await look("camera.png");
  const both = await found(true);
  await page.click("#camera");
  await settled();
  const isClosed = await page.evaluate(() => document.getElementById("video").srcObject === null);
  return { alone, both, isClosed, streams: await page.evaluate(() => window.streams) };
}

async function refusedCamera() {
  await open();
  await page.click("#camera");
  await page.waitForSelector("#problem:not([hidden])", WAIT);
  return found();
}

/** Each file of settings.pictures as the first picture, then something dropped that is no file, then a good picture. */
async function badPictures() {
  await open();
  const told = {};
  for (const name of names) {
    await afterwards(async () => (await page.$("#file-a")).uploadFile(file(name)));
    const { problem, said } = await found();
    told[name] = problem || said;
  }
  await look("problem.png");
  await afterwards(() =>
    page.evaluate(() => {
      const dataTransfer = new DataTransfer();
      dataTransfer.setData("text/plain", "words");
      document.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true }));
    }),
  );
  const words = (await found()).problem;
  await afterwards(async () => (await page.$("#file-a")).uploadFile(file("a.png")));
  return { told, words, mended: await found() };
}

async function noNumbers() {
  await open();
  await afterwards(async () => (await page.$("#file-a")).uploadFile(file("a.png")));
  return { ...(await found()), keypoints: await page.$eval("#keypoints", (one) => one.textContent) };
}

async function badAddress() {
  const told = {};
  for (const query of ["backend=gpu", "threads=-3", "threads=many", "threads=1000"]) {
    await page.goto(`${address}?${query}`);
    await page.waitForSelector("#problem:not([hidden])", WAIT);
    told[query] = (await found()).problem;
  }
  return { told };
}

async function missingNetwork() {
  const told = {};
  await page.setRequestInterception(true);
  let missing = "";
  page.on("request", (request) => {
    if (missing && request.url().includes(missing)) request.respond({ status: 404 });
    else request.continue();
  });
  for (missing of ["model.json", "model.onnx"]) {
    await page.goto(address);
    await page.waitForSelector("#problem:not([hidden])", WAIT);
    told[missing] = (await found()).problem;
  }
  return { told };
}

/** Milliseconds of the network, the decoding and the matching, run after run; for benchmarks/page.py. */
async function speed() {
  await open();
  const ms = [];
  for (let run = 0; run < 13; run++) {
    for (const slot of ["a", "b"]) {
      await afterwards(async () => (await page.$(`#file-${slot}`)).uploadFile(file(`${slot}.png`)));
    }
    if (run >= 3) ms.push(await page.evaluate(() => window.superpoint.result.ms));
  }
  return { ms, backend: (await found()).backend };
}

// -------------------------------------------------------------------------------------------------------------- tools

async function open() {
  await page.goto(address);
  await settled();
}

async function settled() {
  await page.waitForFunction(() => ["ready", "error"].includes(document.documentElement.dataset.state), WAIT);
}

/** Does something, and waits for the result that it brings. */
async function afterwards(action) {
  await page.evaluate(() => {
    window.superpoint = null;
    document.documentElement.dataset.state = "asked"; // not the error of an earlier action
  });
  await action();
  await page.waitForFunction(() => window.superpoint || document.documentElement.dataset.state === "error", WAIT);
}

/** Takes a picture of the page; how much wider its content is than its window. */
async function look(name) {
  await page.evaluate(() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))));
  await page.screenshot({ path: file(name), fullPage: true });
  return page.evaluate(() => ({ over: document.documentElement.scrollWidth - window.innerWidth }));
}

/** What the page shows and holds; with its pictures, which belong to that result though the camera goes on. */
async function found(withPictures = false) {
  const { urls, ...state } = await page.evaluate((withPictures) => {
    const text = (id) => document.getElementById(id).textContent;
    const { result, pictures = {} } = window.superpoint ?? {};
    const { features = {}, match = null } = result ?? {};
    const plain = ({ xy, scores, descriptors }) => ({
      xy: Array.from(xy),
      scores: Array.from(scores),
      descriptors: Array.from(descriptors),
    });
    return {
      features: Object.fromEntries(Object.entries(features).map(([slot, one]) => [slot, plain(one)])),
      rows: match && Array.from(match.rows),
      agree: match?.agree && Array.from(match.agree),
      said: text("said"),
      problem: document.getElementById("problem").hidden ? "" : text("problem"),
      backend: text("backend"),
      network: text("network"),
      matcher: text("matcher"),
      note: text("note"),
      drawn: parseInt(text("drawn")) || 0,
      urls: withPictures ? Object.entries(pictures).map(([slot, canvas]) => [slot, canvas.toDataURL("image/png")]) : [],
    };
  }, withPictures);
  for (const [slot, url] of urls) writeFileSync(file(`seen-${slot}.png`), Buffer.from(url.split(",")[1], "base64"));
  return state;
}
