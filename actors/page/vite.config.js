// Three files with fixed names, which the dashboard embeds.
import { svelte } from "@sveltejs/vite-plugin-svelte";
import { defineConfig } from "vite";

export default defineConfig({
  plugins: [svelte()],
  // While the page is worked on: `npx vite` shows it over a cluster of this machine.
  server: { proxy: { "/api": { target: "http://127.0.0.1:8265", headers: { origin: "http://127.0.0.1:8265" } } } },
  build: {
    modulePreload: { polyfill: false },
    cssCodeSplit: false,
    rollupOptions: {
      output: { entryFileNames: "page/app.js", assetFileNames: "page/app[extname]", codeSplitting: false },
    },
  },
});
