// Builds the page: node build.mjs [FOLDER]. Everything it needs lies in the folder; it loads nothing from elsewhere.

import { cpSync, mkdirSync, rmSync } from "node:fs";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";

import { build } from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const folder = resolve(process.argv[2] ?? join(here, "dist"));
const runtime = join(here, "node_modules", "onnxruntime-web", "dist");

rmSync(folder, { recursive: true, force: true });
mkdirSync(join(folder, "ort"), { recursive: true });
await build({
  entryPoints: [join(here, "src", "page.js"), join(here, "src", "worker.js")],
  outdir: folder,
  bundle: true,
  splitting: true,
  minify: true,
  format: "esm",
  target: "es2022",
  conditions: ["onnxruntime-web-use-extern-wasm"],
  logLevel: "warning",
});
for (const name of ["index.html", "style.css", "licenses.txt"]) cpSync(join(here, "src", name), join(folder, name));
cpSync(join(here, "..", "src", "superpoint_trt", "packaged", "astronaut.jpg"), join(folder, "astronaut.jpg"));
for (const kind of ["", ".jspi"]) {
  for (const ending of ["mjs", "wasm"]) {
    const name = `ort-wasm-simd-threaded${kind}.${ending}`;
    cpSync(join(runtime, name), join(folder, "ort", name));
  }
}
