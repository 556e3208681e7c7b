// The server's documents, and its word that something changed.

/** An answer other than 200 becomes an Error with the server's message. */
async function read(path) {
  const response = await fetch(path, { headers: { accept: "application/json" } });
  if (!response.ok) {
    const told = await response.json().catch(() => null);
    throw new Error(told?.error?.message ?? `the dashboard's server answered ${response.status}`);
  }
  return response.json();
}

const of = (chain, what) => `/api/chains/${encodeURIComponent(chain)}/${what}`;

export const readChains = () => read("/api/chains");
export const readGlance = (chain, bins) => read(of(chain, `glance?bins=${bins}`));
export const readWindow = (chain, first, last) => read(of(chain, `window?first=${first}&last=${last}`));
export const readVersion = (chain, version) => read(of(chain, `versions/${version}`));
export const readSamples = (chain, version) => read(of(chain, `versions/${version}/rollouts`));
export const readComparison = (chain, a, b) => read(of(chain, `compare?a=${a}&b=${b}`));
export const readDiffering = (chain, a, b) => read(of(chain, `differing?a=${a}&b=${b}`));

export function readSeries(chain, names, range) {
  const query = new URLSearchParams(names.map((name) => ["name", name]));
  for (const [key, value] of Object.entries(range)) query.set(key, value);
  return read(of(chain, `series?${query}`));
}

/** Calls `onGenerations` with {chain: generation} now and after every change, `onState` with true while connected. */
export function listen(onGenerations, onState) {
  const source = new EventSource("/api/events");
  source.addEventListener("open", () => onState(true));
  source.addEventListener("error", () => onState(false));
  source.addEventListener("message", (event) => onGenerations(JSON.parse(event.data)));
}
