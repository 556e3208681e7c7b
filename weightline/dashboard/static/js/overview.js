// What stands around the graph: the list of chains, the head of the chosen one, and what is wrong with it.
import { el, put, svg } from "./dom.js";
import * as show from "./format.js";

/** The chains, forks below the chain that they come from, and how many older ones are not shown. */
export function drawChains(sidebar, switcher, { chains: cards, num_left_out: numLeftOut }, chosen, onChain) {
  const ordered = inOrder(cards);
  sidebar.hidden = cards.length < 2;
  document.getElementById("app").classList.toggle("has-sidebar", cards.length > 1);
  put(sidebar, el("ul", {}, ordered.map(([card, depth]) => el("li", { class: depth ? "child" : null }, chainLink(card, chosen)))),
    numLeftOut ? el("p", { class: "soft left-out" }, `${show.count(numLeftOut)} older ${numLeftOut === 1 ? "chain is" : "chains are"} not shown: name the one you want on the command line.`) : null);
  const select = el("select", { "aria-label": "Chain", onchange: (event) => onChain(event.target.value) }, ordered.map(([card]) => el("option", { value: card.id, selected: card.id === chosen }, card.name)));
  put(switcher, cards.length > 1 ? select : null);
}

function inOrder(cards) {
  const parentOf = (card) => cards.find((other) => other !== card && other.url === card.forked_from?.chain);
  const children = (parent) => cards.filter((card) => parentOf(card) === parent);
  const roots = cards.filter((card) => !parentOf(card));
  const placed = roots.flatMap((card) => [[card, 0], ...children(card).map((child) => [child, 1])]);
  const rest = cards.filter((card) => !placed.some(([other]) => other === card)).map((card) => [card, 1]);
  return [...placed, ...rest];
}

function chainLink(card, chosen) {
  const state = card.state === "unreachable" ? el("span", { class: "bad" }, "unreachable") : card.tip === null ? (card.state === "loading" ? "looking\u2026" : "empty") : `v${card.tip}`;
  const right = card.num_broken || card.missing.length ? el("span", { class: "bad" }, "broken") : (card.best ? show.score(card.best.score) : "");
  return el(
    "a",
    { class: "chain-link", href: `#/${card.id}`, "aria-current": card.id === chosen ? "page" : null, title: card.url },
    el("span", { class: "name" }, card.name),
    spark(card.scores),
    el("span", { class: "meta num" }, el("span", {}, state, card.stage ? ` \u00b7 ${card.stage}` : ""), el("span", {}, right)),
  );
}

function spark(scores) {
  if (scores.length < 2) return null;
  const [least, most] = [Math.min(...scores), Math.max(...scores)];
  const points = scores.map((value, at) => `${((at / (scores.length - 1)) * 100).toFixed(2)} ${(20 - (most > least ? (value - least) / (most - least) : 0.5) * 18).toFixed(2)}`);
  return svg("svg", { viewBox: "0 0 100 22", preserveAspectRatio: "none", "aria-hidden": "true" }, svg("path", { d: `M${points.join("L")}` }));
}

/** Name, place and the numbers that sum the chain up. */
export function drawHead(host, card) {
  const fact = (name, value, note) => el("div", {}, el("dt", {}, name), el("dd", {}, value, note ? el("small", {}, note) : null));
  const origin = card.forked_from ? el("div", { class: "soft" }, `Forked from v${card.forked_from.version} of `, el("code", {}, card.forked_from.chain)) : null;
  put(
    host,
    el("h1", { class: "break" }, card.name),
    el("div", { class: "url" }, card.url),
    origin,
    card.tip === null
      ? null
      : el(
          "dl",
          { class: "facts" },
          fact("Tip", `v${card.tip}`, card.stage),
          fact("Committed", show.ago(card.committed_at)),
          fact("Versions", show.count(card.num_versions)),
          fact("Best score", card.best ? show.score(card.best.score) : "\u2013", card.best ? `v${card.best.version}` : null),
          fact("Model", show.short(card.num_elements), "elements"),
          fact("All versions", show.bytes(card.chain_nbytes), card.full_nbytes ? `${(card.chain_nbytes / card.full_nbytes).toFixed(1)} full states` : null),
          fact("Replicas", replicas(card), null),
        ),
  );
}

function replicas(card) {
  const live = card.replicas.filter((replica) => !replica.is_expired);
  if (!live.length) return "none";
  const newest = live.filter((replica) => replica.version === card.tip).length;
  return newest === live.length ? `${live.length} at the tip` : `${newest} of ${live.length} at the tip`;
}

/** What a person must know before trusting the rest of the page. */
export function drawNotices(host, card) {
  const notice = (kind, title, text) => el("div", { class: `notice ${kind}` }, el("strong", {}, title), text ? el("span", {}, text) : null);
  const notices = [];
  if (card.state === "unreachable") {
    notices.push(notice("bad", "The bucket cannot be reached.", `${card.problem} What is shown is what was read before.`));
  }
  if (card.state === "ready" && card.problem) notices.push(notice("bad", "Nothing new is seen.", card.problem));
  for (const { version, reason } of card.broken.slice(0, 3)) notices.push(notice("bad", `Version ${version} is broken.`, reason));
  if (card.num_broken > 3) notices.push(notice("bad", `${card.num_broken - 3} more versions are broken.`));
  if (card.missing.length) {
    const gaps = card.missing.slice(0, 6).map(([first, last]) => show.versions(first, last)).join(", ");
    notices.push(notice("bad", "Versions are missing.", `${gaps}: later versions may not be reachable. weightline verify tells more.`));
  }
  if (card.num_pending > 0 && card.state === "ready") {
    const read = card.num_versions - card.num_pending;
    notices.push(el("div", { class: "notice" }, el("span", {}, `Reading the chain, newest first: ${show.count(read)} of ${show.count(card.num_versions)} versions`), el("progress", { value: read, max: card.num_versions, "aria-label": "Versions read" })));
  }
  put(host, notices);
}

/** Instead of a graph: nothing is there yet, or nothing can be seen. */
export function drawEmpty(host, card) {
  const picture = svg("svg", { viewBox: "0 0 220 60", "aria-hidden": "true" }, svg("path", { d: "M20 30h180", "stroke-dasharray": "4 6" }), svg("rect", { x: 12, y: 22, width: 16, height: 16, rx: 4 }), [70, 120, 170].map((cx) => svg("circle", { cx, cy: 30, r: 7 })));
  const [title, text] =
    card.state === "unreachable"
      ? ["This bucket cannot be reached", card.problem]
      : card.state === "loading"
        ? ["Looking at the bucket", card.problem]
        : ["No version yet", "The first commit appears here by itself. Train with the callback, or commit a checkpoint:"];
  const command = card.state === "ready" ? el("code", {}, `weightline commit ${card.url} ./checkpoint`) : null;
  put(host, el("div", { class: "card empty" }, picture, el("h2", {}, title), text ? el("p", { class: "break" }, text) : null, command));
}
