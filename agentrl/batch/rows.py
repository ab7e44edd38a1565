"""From trajectories to the rows a model reads, with one link back: action token k sits at (row, column).

A row is a maximal stretch of turns whose context only grew (`Turn.new_row` starts the next one): with full history one
row per trajectory (*packed*), with a window one row per turn once the window slides (*per-turn*). Everything but the
sampled ids is context: it is read, never scored.

Rows are never padded. A micro-batch is some rows laid end to end; equal rows are computed once, and so is, on a CPU,
what several rows begin with (the members of a group have the same prompt): `agentrl.batch.sharing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from agentrl.batch.index import Index
from agentrl.batch.sharing import apart, share
from agentrl.errors import DataError
from agentrl.models.attention import WORTH_SHARING, PackedSequences
from agentrl.models.tree_attention import TokenTree
from agentrl.types import ImageSpan, Trajectory, Turn

Tensor = torch.Tensor


@dataclass(frozen=True)
class MicroBatch:
    """Some rows laid end to end. T = number of tokens, k = number of *distinct* action positions in them."""

    ids: Tensor
    """(T,) int64 token ids."""
    positions: Tensor
    """(T,) int64 position inside the row."""
    plan: PackedSequences | TokenTree
    predict_at: Tensor
    """(k,) int64: flat position whose logits predict the action token."""
    target: Tensor
    """(k,) int64: the action token's id."""
    tokens: Tensor
    """(j,) int64: which of the batch's action tokens this micro-batch scores; j >= k when rows repeat."""
    slot: Tensor
    """(j,) int64: for each of `tokens`, its entry among the k."""
    images: tuple[tuple[ImageSpan, ...], ...] = ()
    """Per row: its pictures, `start` counted from the row's first token; empty where no row has any."""


@dataclass
class Batch:
    """Trajectories as index vectors and rows."""

    index: Index
    trajectories: list[Trajectory]
    token_ids: Tensor
    """(K,) int64 sampled ids."""
    behaviour: Tensor
    """(K,) float32 log-probs recorded while sampling, nats."""
    rows: list[list[int]]
    """B rows of ids; repeated rows are listed once."""
    tokens_of_row: list[list[tuple[int, list[int]]]]
    """Per row: (column, action tokens sitting there), ascending; several tokens where equal rows were merged."""
    images_of_row: list[list[ImageSpan]] = field(default_factory=list)
    """Per row: its pictures; `start` counts from the row's first id."""
    device: str = "cpu"
    _traj_rows: list[list[int]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Number of tokens in the rows; a model reads fewer where rows share their beginnings."""
        return sum(map(len, self.rows))

    def microbatches(self, budget: int, trajectories: Sequence[int] | None = None) -> list[MicroBatch]:
        """Splits the rows of `trajectories` (positions; None = all) into micro-batches of at most `budget` tokens.

        A single row above the budget gets a micro-batch of its own: rows are never cut.
        """
        chosen = list(range(len(self.rows)))
        keep: list[bool] | None = None
        members = set(range(self.index.N) if trajectories is None else trajectories)
        if len(members) < self.index.N:
            chosen = sorted({row for traj in members for row in self._traj_rows[traj]})
            keep = [traj in members for traj in self.index.traj_of_token.tolist()]
        # Equal lengths side by side share a call of the kernel; rows that begin alike, a part of the micro-batch.
        order = sorted(chosen, key=self.rows.__getitem__ if self._shares else lambda row: len(self.rows[row]))
        parts: list[list[int]] = []
        size = 0
        for row in order:
            length = len(self.rows[row])
            if not parts or size + length > budget:
                parts.append([])
                size = 0
            parts[-1].append(row)
            size += length
        return [self._microbatch(part, keep) for part in parts]

    @property
    def _shares(self) -> bool:
        """Whether what rows begin with alike is read once: on a CPU, and without pictures, which stand in rows."""
        return self.device == "cpu" and not any(self.images_of_row)

    def _microbatch(self, rows: list[int], keep: list[bool] | None) -> MicroBatch:
        """Lays `rows` end to end; `keep` says which of the K action tokens are scored."""
        own = [self.rows[row] for row in rows]
        forest = share(own, WORTH_SHARING) if self._shares else apart(own)
        starts = [0, *accumulate(stretch.stop - stretch.start for stretch in forest.stretches)]
        ids: list[int] = []
        positions: list[int] = []
        for stretch in forest.stretches:
            ids += own[stretch.row][stretch.start : stretch.stop]
            positions += range(stretch.start, stretch.stop)
        distinct: dict[tuple[int, int], int] = {}
        tokens: list[int] = []
        slot: list[int] = []
        for row, path in zip(rows, forest.paths, strict=True):
            at, end, places = 0, 0, iter(path)  # token `column` of the row stands at `at + column`, below `end`
            for column, owners in self.tokens_of_row[row]:
                if keep is not None:
                    owners = [k for k in owners if keep[k]]
                    if not owners:
                        continue
                while column > end:
                    place = next(places)
                    at, end = starts[place] - forest.stretches[place].start, forest.stretches[place].stop
                prediction = (at + column - 1, self.rows[row][column])
                slot.extend([distinct.setdefault(prediction, len(distinct))] * len(owners))
                tokens.extend(owners)
        to: dict[str, Any] = {"device": self.device}
        images = tuple(tuple(self.images_of_row[row]) for row in rows) if self.images_of_row else ()
        whole = all(stretch.below == 0 for stretch in forest.stretches)
        return MicroBatch(
            images=images if any(images) else (),
            ids=torch.tensor(ids, **to),
            positions=torch.tensor(positions, **to),
            plan=PackedSequences(tuple(stretch.stop - stretch.start for stretch in forest.stretches))
            if whole
            else TokenTree(tuple((stretch.stop - stretch.start, stretch.below) for stretch in forest.stretches)),
            predict_at=torch.tensor([at for at, _ in distinct], dtype=torch.int64, **to),
            target=torch.tensor([token for _, token in distinct], dtype=torch.int64, **to),
            tokens=torch.tensor(tokens, dtype=torch.int64),
            slot=torch.tensor(slot, dtype=torch.int64),
        )


def rows_of(turns: Sequence[Turn]) -> list[list[Turn]]:
    """Splits an episode's turns into the stretches that share one model row."""
    rows: list[list[Turn]] = []
    for turn in turns:
        if turn.new_row or not rows:
            rows.append([])
        rows[-1].append(turn)
    return rows


def build_batch(trajectories: Sequence[Trajectory], *, device: str = "cpu", merge_equal_rows: bool = True) -> Batch:
    """Builds the batch of `trajectories`; turns without action tokens stay in the index and score nothing.

    Args:
        trajectories: scorable trajectories of a model policy (N).
        device: where micro-batches are made.
        merge_equal_rows: compute rows with the same ids once (exact: their tokens share one log-prob).

    Raises:
        DataError: a trajectory whose ids and log-probs disagree, or whose first context is empty.
    """
    groups: dict[str, int] = {}
    group_of_traj = [groups.setdefault(t.group_id, len(groups)) for t in trajectories]
    turn_of_token: list[int] = []
    traj_of_turn: list[int] = []
    token_ids: list[int] = []
    behaviour: list[float] = []
    rows: list[list[int]] = []
    tokens_of_row: list[list[tuple[int, list[int]]]] = []
    images_of_row: list[list[ImageSpan]] = []
    row_at: dict[tuple[int | str, ...], int] = {}
    traj_rows: list[list[int]] = []
    for n, trajectory in enumerate(trajectories):
        traj_rows.append([])
        for stretch in rows_of(trajectory.turns):
            ids: list[int] = []
            images: list[ImageSpan] = []
            places: list[tuple[int, list[int]]] = []
            for turn in stretch:
                _check(trajectory, turn)
                images += [span.moved(len(ids)) for span in turn.prompt_images]
                ids += turn.prompt_ids
                if turn.action_ids and not ids:
                    raise DataError(f"trajectory {trajectory.id}: an action without any context before it")
                for token, logprob in zip(turn.action_ids, turn.action_logprobs, strict=True):
                    places.append((len(ids), [len(token_ids)]))
                    ids.append(token)
                    token_ids.append(token)
                    behaviour.append(logprob)
                    turn_of_token.append(len(traj_of_turn))
                traj_of_turn.append(n)
            if not places:
                continue
            # Columns belong to the key: equal ids could be split differently into context and action. So do pictures:
            # all placeholders are the same id.
            seen = (span.image.path for span in images)
            key: tuple[int | str, ...] = (*ids, -1, *(column for column, _ in places), *seen)
            if merge_equal_rows and (row := row_at.get(key)) is not None:
                for (_, owners), (_, new) in zip(tokens_of_row[row], places, strict=True):
                    owners += new
            else:
                row = row_at[key] = len(rows)
                rows.append(ids)
                tokens_of_row.append(places)
                images_of_row.append(images)
            traj_rows[n].append(row)
    return Batch(
        index=Index(
            torch.tensor(turn_of_token, dtype=torch.int64),
            torch.tensor(traj_of_turn, dtype=torch.int64),
            torch.tensor(group_of_traj, dtype=torch.int64),
        ),
        trajectories=list(trajectories),
        token_ids=torch.tensor(token_ids, dtype=torch.int64),
        behaviour=torch.from_numpy(np.asarray(behaviour, dtype=np.float32)),
        rows=rows,
        tokens_of_row=tokens_of_row,
        images_of_row=images_of_row,
        device=device,
        _traj_rows=traj_rows,
    )


def in_words(trajectory: Trajectory) -> Trajectory:
    """Returns the episode as a model without eyes reads it: the words of each picture in its place (`ImagePart.alt`).

    Action ids and log-probs stay, so that a batch of such episodes lists the same K tokens in the same order.
    """
    if not any(turn.prompt_images for turn in trajectory.turns):
        return trajectory
    turns = []
    for turn in trajectory.turns:
        ids = list(turn.prompt_ids)
        for span in reversed(turn.prompt_images):
            ids[span.start : span.start + span.length] = span.text_ids
        turns.append(turn.model_copy(update={"prompt_ids": ids, "prompt_images": []}))
    return trajectory.model_copy(update={"turns": turns})


def _check(trajectory: Trajectory, turn: Turn) -> None:
    if len(turn.action_ids) != len(turn.action_logprobs):
        raise DataError(
            f"trajectory {trajectory.id}: {len(turn.action_ids)} action ids but {len(turn.action_logprobs)} log-probs"
        )
