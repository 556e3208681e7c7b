"""Create-only puts over an API without conditional writes: a log of claims, whose first entry wins.

The Hub's bucket API replaces an existing path, so two writers of one key would overwrite each other silently. Here each
writer first writes a **claim**: a file of its own, `claims/<key>/<uuid>`, that refers to the body. The Hub stamps it
with its own clock (`uploaded_at`). The claims of a key, ordered by (uploaded_at, path), are a log; **its first entry
has won, for good**, whether or not its writer is still alive or has seen the result. Steps of a writer:

1. Look whether the key exists. If it does, the writer has lost.
2. Upload the body; write the claim by one request that is never repeated.
3. Wait `settle_seconds`, then list the claims. If its own claim is not among them, wait and list again.
4. Publish: make the key refer to the first claim's content (its own or another's), and check that it does.
5. If the first claim is not its own: withdraw its own claim and raise ObjectExistsError.

Readers read keys only and never look at claims.

**Why one wins.** Let W be the first claim of the log. It is never withdrawn: only claims that saw an earlier one are.
Any writer that decides has its own claim, later than W, in its listing. If a listing that shows a claim shows all
earlier ones (however far it lags behind), it shows W, so every writer decides for W and publishes the same content.
`settle_seconds` covers what breaks "all earlier ones": claims stamped within the same millisecond, servers whose
clocks differ, and entries that become visible out of order. It must exceed that skew; it need not exceed the lag.

**When that fails** (skew beyond the wait), two writers may both publish. Step 4 looks before it writes and after,
which leaves a window of one round trip. In any case both claims stay, and `forks` reports them.

**Lost replies and late requests.** A repeated claim would be stamped anew and could turn from first to second after
its writer decided. So a claim is sent once; when its reply is lost, the next attempt is another claim with another
uuid, and the first of a writer's claims counts. A claim that arrives late is stamped late and loses. Publishing may be
repeated and may arrive late: it writes the winner's content, which is already there.

**Crashes.** Before step 2: nothing happened. After it: the claim may have won; the next writer of the key finds it
first, publishes it (step 4 for another's claim) and loses to it. A crashed loser leaves a claim that `forks` reports:
other processes cannot distinguish it from a writer that decided it had won.

**Unknown outcome.** A writer whose claim never shows, or whose requests fail after step 2, raises TransientStorageError
and withdraws nothing, since its claim may have won. A repeated put finds the key taken, reads it and compares.

Cost of an uncontested create in requests of the Hub's API: look, claim, list, look, publish, look: six, and one for a
token that then serves for its life. Safe for threads and processes.
"""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from collections.abc import Collection, Iterable
from datetime import UTC, datetime

from weightline.errors import ObjectExistsError, StorageError, TransientStorageError
from weightline.store.base import Contest
from weightline.store.hub.bucket import HubBucket, HubFile
from weightline.store.hub.content import Content

CLAIMS = "claims/"

_NEVER = datetime.max.replace(tzinfo=UTC)

_MAX_ATTEMPTS = 3

#: Time that a claim confirmed by the Hub may take to show in a listing.
VISIBLE_SECONDS = 30.0

_PUBLISH_PAUSES_SECONDS = (0.0, 0.0, 0.1, 0.3, 0.6, 1.0, 2.0, 4.0)


def first_claim(claims: Iterable[HubFile]) -> HubFile | None:
    """Returns the claim that has won: the earliest by the Hub's clock, then by path. None without claims. Pure."""
    return min(claims, key=lambda claim: (claim.uploaded_at or _NEVER, claim.path), default=None)


def judge(key: str, claims: Collection[HubFile], published: HubFile | None) -> Contest | None:
    """Returns the problem of a key, given its claims and its published file; None when there is no problem. Pure.

    Claims with the same content count as attempts of one writer. The message of an `unpublished` key depends on the
    winner only, so it stays the same when further claims arrive.
    """
    winner = first_claim(claims)
    if winner is None:
        return None
    names = ", ".join(sorted(claim.path.rpartition("/")[2] for claim in claims))
    if published is not None and published.content != winner.content:
        return Contest(key, "fork", f"was claimed first by {winner.path}, and holds other bytes (claims {names})")
    if published is None:
        return Contest(
            key, "unpublished",
            f"was won by {winner.path}, whose writer stopped before readers could see it. Run that writer twice: the "
            "first run publishes the key and ends with the error that it is taken, the second run continues from "
            f"there. To discard the key instead, while no writer runs, delete {winner.path.rpartition('/')[0]}/",
        )  # fmt: skip
    if len({claim.content for claim in claims}) > 1:
        return Contest(
            key, "fork",
            f"has the claims of several writers ({names}): either one stopped before it withdrew its claim, or two "
            f"decided that they won. It holds the bytes of {winner.path}, the first claim; once no writer runs, delete "
            "the other claims",
        )  # fmt: skip
    return None


class ClaimLog:
    """Create-only puts below one root of a bucket."""

    def __init__(
        self, bucket: HubBucket, root: str, settle_seconds: float, visible_seconds: float = VISIBLE_SECONDS
    ) -> None:
        self._bucket = bucket
        self._root = root
        self._settle_seconds = settle_seconds
        self._visible_seconds = visible_seconds

    def folder(self, key: str) -> str:
        """Returns the path of the folder that holds the claims of a key, with a slash at its end."""
        return f"{self._root}{CLAIMS}{key}/"

    def claims(self, key: str) -> list[HubFile]:
        """Returns the claims of a key. StorageError when the Hub gives no upload time for one."""
        return [_stamped(claim) for claim in self._bucket.below(self.folder(key))]

    def claims_of(self, keys: Collection[str]) -> list[HubFile]:
        """Returns the claims of several keys, from one listing of all claims."""
        if len(keys) == 1:
            return [claim for key in keys for claim in self.claims(key)]
        folders = {self.folder(key) for key in keys}
        found = self._bucket.below(f"{self._root}{CLAIMS}")
        return [claim for claim in found if f"{claim.path.rpartition('/')[0]}/" in folders]

    def put_if_absent(self, key: str, body: bytes) -> None:
        """Creates the object. ObjectExistsError when the key is taken.

        After TransientStorageError the object may have been created or not.
        """
        path = f"{self._root}{key}"
        if self._bucket.find([path]):
            raise self._exists(key)
        content = self._bucket.upload(body)
        mine: set[str] = set()
        claims = self._contest(key, content, mine)
        winner = first_claim(claims)
        if winner is None:
            raise TransientStorageError(f"the claims of {key} in {self._bucket.url} vanished", key=key)
        has_published = self._publish(path, winner)
        is_won = winner.path in mine and has_published
        # Claims with this content that did not win are withdrawn, including those of an earlier call.
        spent = {c.path for c in claims if c.content == content} | mine
        self._withdraw(spent - {winner.path} if has_published else spent)
        if not is_won:
            raise self._exists(key)

    def forks(self) -> list[Contest]:
        """Returns the keys whose claims contradict each other, or that were won and never published.

        Looks twice, `settle_seconds` * 2 apart, and leaves out keys that change meanwhile: their put is under way.
        """
        suspects = self._judged()
        if not suspects:
            return []
        time.sleep(self._settle_seconds * 2)
        return [contest for key, contest in self._judged().items() if suspects.get(key) == contest]

    def _judged(self) -> dict[str, Contest]:
        by_key: dict[str, list[HubFile]] = defaultdict(list)
        start = len(f"{self._root}{CLAIMS}")
        for claim in self._bucket.below(f"{self._root}{CLAIMS}"):
            by_key[claim.path[start:].rpartition("/")[0]].append(claim)
        published = self._bucket.find([f"{self._root}{key}" for key in by_key]) if by_key else {}
        judged = {key: judge(key, claims, published.get(f"{self._root}{key}")) for key, claims in by_key.items()}
        return {key: contest for key, contest in judged.items() if contest is not None}

    def _contest(self, key: str, content: Content, mine: set[str]) -> list[HubFile]:
        """Claims the key until a claim of this call shows in a listing, and returns that listing.

        Adds the paths of its claims to `mine`.
        """
        problem: TransientStorageError | None = None
        for _ in range(_MAX_ATTEMPTS):
            claim = f"{self.folder(key)}{uuid.uuid4().hex}"
            mine.add(claim)
            confirmed: str | None = claim
            try:
                self._bucket.write(claim, content, is_repeated=False)
            except TransientStorageError as error:
                problem, confirmed = error, None
            claims = self._settled(key, mine, confirmed)
            if claims:
                return claims
            if confirmed:
                break
        raise TransientStorageError(
            f"a claim of {key} does not show in {self._bucket.url}: it is unknown whether the object was created"
            + (f" ({problem})" if problem else ""),
            key=key, url=self._bucket.url,
        ) from problem  # fmt: skip

    def _settled(self, key: str, mine: Collection[str], confirmed: str | None) -> list[HubFile]:
        """Waits until one of `mine` shows and has settled; returns the claims of the key. Empty after the deadline.

        `confirmed` is the claim whose reply arrived, if any: its settling time starts at that reply. A claim that shows
        although its reply was lost may have arrived just now, so its settling time starts when it shows.
        """
        deadline = time.monotonic() + self._settle_seconds + (self._visible_seconds if confirmed else 0.0)
        pause = self._settle_seconds
        settled = {confirmed} if confirmed else set()
        while True:
            time.sleep(pause)
            claims = self.claims(key)
            shown = {claim.path for claim in claims if claim.path in mine}
            if shown & settled:
                return claims
            if shown:
                settled, pause = shown, self._settle_seconds
            elif time.monotonic() >= deadline:
                return []
            else:
                pause = min(max(pause, 0.05) * 1.5, 5.0)

    def _publish(self, path: str, winner: HubFile) -> bool:
        """Makes the key refer to the winner's content. Returns False when it refers to other content already."""
        for pause in _PUBLISH_PAUSES_SECONDS:
            time.sleep(pause)
            found = self._bucket.find([path]).get(path)
            if found is not None:
                return found.content == winner.content
            self._bucket.write(path, winner.content)
        raise TransientStorageError(
            f"{path} was published in {self._bucket.url} and does not show", key=path, url=self._bucket.url
        )

    def _withdraw(self, claims: Collection[str]) -> None:
        """Removes claims that lost. Best effort: `forks` reports a claim that stays."""
        try:
            self._bucket.remove(claims)
        except StorageError:
            return

    def _exists(self, key: str) -> ObjectExistsError:
        return ObjectExistsError(f"{key} exists in {self._bucket.url}", key=key, url=self._bucket.url)


def _stamped(claim: HubFile) -> HubFile:
    if claim.uploaded_at is None:
        raise StorageError(
            f"{claim.path}: the Hub gives no upload time, so claims have no order. Set HF_S3_ACCESS_KEY_ID and "
            "HF_S3_SECRET_ACCESS_KEY to commit through its S3 gateway",
            key=claim.path,
        )
    return claim
