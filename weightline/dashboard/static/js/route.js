// What is shown, as the part of the address after #: #/chain, #/chain/v12, #/chain/v3..v12.

/** {chain, version, compared}; null where the address does not say: the first chain, the tip, no comparison. */
export function parseRoute(hash) {
  const found = /^#\/([^/]*)(?:\/(?:v(\d+)\.\.)?v(\d+))?$/.exec(hash);
  if (!found) return { chain: null, version: null, compared: null };
  const [, chain, compared, version] = found;
  return { chain: decodeURIComponent(chain) || null, version: asNumber(version), compared: asNumber(compared) };
}

export function routeTo({ chain, version, compared }) {
  const at = version === null ? "" : compared === null ? `/v${version}` : `/v${compared}..v${version}`;
  return `#/${encodeURIComponent(chain)}${at}`;
}

const asNumber = (digits) => (digits === undefined ? null : Number(digits));
