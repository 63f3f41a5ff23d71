// Opens the network in onnxruntime-web: on the graphics card where that works, else on the processor.

/**
 * @param {{name: string, url: string}} model
 * @param {{backend: "auto" | "webgpu" | "wasm", threads: number | null}} wish
 * @returns {Promise<{infer: Function, backend: string, note: string, ort: object}>} note: why WebGPU is not used, if it
 *   is not; ort: onnxruntime-web as it is set up.
 */
export async function openNetwork(model, wish) {
  const bytes = await download(model);
  if (wish.backend === "wasm") return openOnProcessor(bytes, wish, "");
  const missing = await whyNoWebGpu(wish.backend === "webgpu");
  if (missing) return openOnProcessor(bytes, wish, missing);
  try {
    return await openOnGraphicsCard(bytes);
  } catch (error) {
    return openOnProcessor(bytes, wish, `WebGPU failed: ${firstLine(error)}`);
  }
}

/** The bytes of a model {name, url}. */
export async function download(model) {
  let answer;
  try {
    answer = await fetch(model.url);
  } catch (error) {
    throw new Error(`The network ${model.name} did not load (${firstLine(error)}). Is superpoint web still running?`);
  }
  if (!answer.ok) {
    throw new Error(`The network ${model.name} is missing: ${model.url} answered ${answer.status}.`);
  }
  return new Uint8Array(await answer.arrayBuffer());
}

/** The reason in words; empty: WebGPU is there. This build of onnxruntime-web also needs JavaScript Promise Integration. */
async function whyNoWebGpu(softwareToo) {
  if (!navigator.gpu) return "this browser has no WebGPU";
  if (!("Suspending" in WebAssembly)) return "this browser's WebAssembly cannot wait for WebGPU (no JSPI)";
  const adapter = await navigator.gpu.requestAdapter().catch(() => null);
  if (!adapter) return "WebGPU finds no graphics card";
  if (adapter.info?.isFallbackAdapter && !softwareToo) return "WebGPU has no graphics card, only software";
  return "";
}

async function openOnGraphicsCard(bytes) {
  const ort = await import("onnxruntime-web/jspi");
  prepare(ort, 1);
  const session = await ort.InferenceSession.create(bytes, { executionProviders: ["webgpu"] });
  const network = runner(ort, session, "WebGPU", "");
  await network.infer(new Float32Array(64 * 64), 64, 64); // finds a graphics card that fails before it is relied on
  return network;
}

async function openOnProcessor(bytes, { threads }, note) {
  const ort = await import("onnxruntime-web/wasm");
  const most = self.crossOriginIsolated ? Math.min(4, Math.ceil((navigator.hardwareConcurrency || 1) / 2)) : 1;
  const used = threads ? Math.min(threads, self.crossOriginIsolated ? threads : 1) : most;
  prepare(ort, used);
  const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  return runner(ort, session, `WASM, ${used} ${used === 1 ? "thread" : "threads"}`, note);
}

function prepare(ort, threads) {
  ort.env.wasm.wasmPaths = new URL("ort/", self.location.href).href;
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error";
}

function runner(ort, session, backend, note) {
  async function infer(input, width, height) {
    const image = new ort.Tensor("float32", input, [1, 1, height, width]);
    const { scores, descriptors } = await session.run({ image });
    if (![scores, descriptors].every(({ data }) => isFinite(data.reduce((sum, value) => sum + value, 0)))) {
      throw new Error(`The network's answer has values that are no numbers (NaN), on ${backend}: its weights may be broken.`);
    }
    const found = { scores: scores.data.slice(), descriptors: descriptors.data.slice(), dim: descriptors.dims[1] };
    scores.dispose();
    descriptors.dispose();
    return found;
  }
  return { infer, backend, note, ort };
}

function firstLine(error) {
  return String(error?.message ?? error).split("\n")[0].slice(0, 160);
}
