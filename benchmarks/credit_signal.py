"""Does the turn signal tell the truth? Step rewards against the exact advantage of every turn.

On Sokoban with one box and `history: window(0)` the policy is a Markov policy over at most a few hundred states a
level, so that its value function is a small dynamic program: pi(a|s) for every state of the level in one forward
pass, then

    V_0(s) = 0,   Q_h(s, a) = 1 if a solves the level else V_{h-1}(s'),   V_h(s) = sum_a pi(a|s) Q_h(s, a)
    A_h(s, a) = Q_h(s, a) - V_h(s)                                       h = turns left, a's own turn included

Every turn of a training batch then has its true advantage under the policy that played it. Printed for each iteration
and at the end as means over iterations: Spearman rank correlation with the truth of the step reward, the episode term
A^E and A^E + alpha A^S; the same against the solver's judgement of the move; the share of the truth's variance that
each explains linearly (r2), and the weight alpha with which both together explain most; and how often the sign is right
on decisive turns (|A| > 0.1).

    python benchmarks/credit_signal.py configs/sokoban_oprl.yaml iterations=20 prm.centred=true
    python benchmarks/credit_signal.py configs/sokoban_oprl.yaml credit.options.alpha=0 --json signal.json
    python benchmarks/credit_signal.py configs/sokoban_oprl.yaml --variants all --seeds 0,1,2 iterations=20

With --variants the policy is trained by A^E alone (alpha = 0), so that all variants judge the very same episodes; one
line of a table each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch

from agentrl.batch import build_batch, score
from agentrl.config import load_config
from agentrl.errors import UserError
from agentrl.train.trainer import Trainer
from agentrl.types import Trajectory, Turn
from environments.sokoban.board import MOVES, draw_board, move, name_cells, read_board
from environments.sokoban.solver import move_values


class ExactValues:
    """Values of a policy on one-box levels by dynamic programming; make a new one after each policy update."""

    def __init__(self, trainer: Trainer) -> None:
        self.model, self.chat = trainer.model, trainer.policy.chat  # type: ignore[attr-defined]
        config = trainer.config
        if config.rollout.history != "window(0)" or config.env.instructions is None:
            raise UserError("exact values need rollout.history='window(0)' and env.instructions set: a Markov policy")
        self.instructions = config.env.instructions
        self.cells = config.env.kwargs.get("observation") == "cells"
        self.horizon = config.env.max_turns or 20
        self.temperature = config.rollout.temperature
        self.levels: dict[Any, tuple[np.ndarray, np.ndarray, dict[tuple[int, int], int]]] = {}

    def prepare(self, boards: Sequence[str]) -> None:
        """Computes the values of the levels of `boards` in one batch."""
        layouts, states = {}, {}
        for board in boards:
            layout, player, boxes = read_board(board)
            layouts[layout.static] = layout
            found = states.setdefault(layout.static, {})
            frontier = [(player, min(boxes))]
            while frontier:
                state = frontier.pop()
                if state in found:
                    continue
                found[state] = None
                if state[1] not in layout.targets:
                    frontier += [_after(layout, state, name) for name in MOVES]
        probability = self._policy([(layouts[s], *state) for s in layouts for state in states[s]])
        start = 0
        for static, layout in layouts.items():
            number = {state: i for i, state in enumerate(states[static])}
            pi = probability[start : start + len(number)]
            start += len(number)
            after, solved = np.empty((len(number), 4), dtype=np.int64), np.zeros((len(number), 4), dtype=bool)
            for (player, box), i in number.items():
                for a, name in enumerate(MOVES):
                    state = (player, box) if box in layout.targets else _after(layout, (player, box), name)
                    after[i, a] = number[state]
                    solved[i, a] = state[1] in layout.targets
            values, quality = [np.zeros(len(number))], [np.zeros((len(number), 4))]
            stay = 1 - pi.sum(1)
            for _ in range(self.horizon):
                quality.append(np.where(solved, 1.0, values[-1][after]))
                values.append((pi * quality[-1]).sum(1) + stay * values[-1])
            self.levels[static] = np.stack(values), np.stack(quality), number

    def advantage(self, board: str, action: str, turns_left: int) -> float:
        """Returns A_h(s, a) for the board before the action."""
        layout, player, boxes = read_board(board)
        values, quality, number = self.levels[layout.static]
        i = number[player, min(boxes)]
        if action not in MOVES:
            return float(values[turns_left - 1][i] - values[turns_left][i])
        return float(quality[turns_left][i, list(MOVES).index(action)] - values[turns_left][i])

    def _policy(self, states: list[tuple[Any, int, int]]) -> np.ndarray:
        """(states, 4) probability of each move: the product over its tokens and the end of the turn."""
        actions = [self.chat.encode_action(name) for name in MOVES]
        turns = []
        for layout, player, box in states:
            boxes = frozenset([box])
            text = name_cells(layout, player, boxes) if self.cells else draw_board(layout, player, boxes)
            prompt = self.chat.start(self.instructions, text)
            turns += [
                Turn.model_construct(prompt_ids=prompt, action_ids=ids, action_logprobs=[0.0] * len(ids), new_row=True)
                for ids in actions
            ]
        batch = build_batch([Trajectory.model_construct(id="states", group_id="states", turns=turns)])
        logp = score(self.model, batch, budget=32768, temperature=self.temperature).logprob
        total = torch.zeros(batch.index.M, dtype=torch.float64).index_add_(0, batch.index.turn_of_token, logp.double())
        return total.exp().view(-1, len(MOVES)).numpy()


def _after(layout: Any, state: tuple[int, int], action: str) -> tuple[int, int]:
    player, boxes = move(layout, state[0], frozenset([state[1]]), layout.deltas[action])
    return player, min(boxes)


def boards_of(trajectory: Trajectory, first: str) -> list[str]:
    """Boards before each turn, from the state keys after the turns."""
    return [first, *(turn.info["state_key"] for turn in trajectory.turns[:-1])]


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation with mid-ranks for ties; 0 where a side does not vary."""
    ranks = []
    for values in (x, y):
        order, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        del order
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
    if min(r.std() for r in ranks) == 0:
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def explained(truth: np.ndarray, *signals: np.ndarray) -> float:
    """Share of the truth's variance that the best linear combination of `signals` explains."""
    design = np.stack([*signals, np.ones(len(truth))], axis=1)
    residual = truth - design @ np.linalg.lstsq(design, truth, rcond=None)[0]
    return float(1 - residual.var() / truth.var()) if truth.var() > 0 else 0.0


def best_alpha(truth: np.ndarray, episode: np.ndarray, step: np.ndarray) -> float:
    """Weight of the standardised step reward against the standardised episode term in the best linear combination."""
    if min(episode.std(), step.std()) == 0:
        return 0.0
    design = np.stack([x / x.std() for x in (episode, step)] + [np.ones(len(truth))], axis=1)
    first, second, _ = np.linalg.lstsq(design, truth, rcond=None)[0]
    return float(second / first) if first > 0 else float("inf")


class Probe(Trainer):
    """A trainer that compares each iteration's advantages with the truth before it updates the policy."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.rows: list[dict[str, float]] = []

    def _update(self, batch: Any, advantage: torch.Tensor) -> dict[str, Any]:
        assert self.last is not None
        judged, index = self.last.advantage, batch.index
        starts = {}
        for task in self.tasks():
            _, info = self._environment().reset(seed=task.seed)
            starts[task.group_id] = info["state_key"]
        exact = ExactValues(self)
        exact.prepare(list(starts.values()))
        truth, distance = [], []
        for trajectory in batch.trajectories:
            for number, (turn, board) in enumerate(
                zip(trajectory.turns, boards_of(trajectory, starts[trajectory.group_id]), strict=True)
            ):
                truth.append(exact.advantage(board, turn.action, exact.horizon - number))
                values = move_values(board)
                best = min(values.values())
                distance.append(-min(values.get(turn.action, best + 2) - best, 5.0) if best < np.inf else np.nan)
        a, d = np.array(truth), np.array(distance)
        step, episode = judged.step.double().numpy(), judged.episode.double().numpy()
        reward = np.zeros(index.M)
        if self.last.token_reward is not None:
            np.add.at(reward, index.turn_of_token.numpy(), self.last.token_reward.double().numpy())
        alive, decisive = ~np.isnan(d), np.abs(a) > 0.1
        row = {
            "step": spearman(reward, a),
            "episode": spearman(episode, a),
            "sum": spearman(episode + step, a),
            "step_solver": spearman(reward[alive], d[alive]),
            "episode_solver": spearman(episode[alive], d[alive]),
            "r2_step": explained(a, reward),
            "r2_episode": explained(a, episode),
            "r2_both": explained(a, episode, reward),
            "best_alpha": best_alpha(a, episode, reward),
            "sign_step": float((np.sign(step - step.mean())[decisive] == np.sign(a)[decisive]).mean()),
            "sign_episode": float((np.sign(episode)[decisive] == np.sign(a)[decisive]).mean()),
            "sign_sum": float((np.sign(episode + step)[decisive] == np.sign(a)[decisive]).mean()),
        }
        self.rows.append(row)
        return super()._update(batch, advantage)

    def _environment(self) -> Any:
        from agentrl.envs import make

        if not hasattr(self, "_env"):
            self._env = make(self.config.env.id, **self.config.env.kwargs)
        return self._env


PUBLISHED = [
    *("prm.centred=false", "prm.reference=behaviour", "prm.min_probability=0", "prm.score=sum"),
    "credit.options={alpha: 0}",
]
VARIANTS: dict[str, list[str]] = {
    "published": PUBLISHED,
    "mean over turns": [*PUBLISHED, "prm.score=mean"],
    "centred": [*PUBLISHED, "prm.centred=true"],
    "frozen reference": [*PUBLISHED, "prm.reference=frozen"],
    "centred, frozen": [*PUBLISHED, "prm.centred=true", "prm.reference=frozen"],
    "centred, frozen, squared loss": [
        *(*PUBLISHED, "prm.centred=true", "prm.reference=frozen", "prm.loss=ipo", "prm.beta=0.2"),
    ],
    "centred, frozen, rare tokens out (demo)": ["credit.options.alpha=0"],
}
COLUMNS = (
    "pair_accuracy",
    "pair_accuracy_per_turn",
    "step",
    "episode",
    "r2_step",
    "r2_episode",
    "r2_both",
    "best_alpha",
)


def probe_run(config_path: str, overrides: list[str], quiet: bool = False) -> tuple[list[dict[str, float]], list[Any]]:
    """Trains one run; returns the comparison with the truth and the metrics of each iteration."""
    with tempfile.TemporaryDirectory() as folder:
        extra = [f"run_dir={folder}", "eval.every=0", "log.tensorboard=false", "buffer.write_trajectories=false"]
        probe = Probe(load_config(config_path, [*overrides, *extra]))
        metrics: list[dict[str, Any]] = []
        while probe.iteration < probe.config.iterations:
            metrics.append(probe.iterate())
            if not quiet:
                show(metrics[-1], probe.rows[-1])
        probe.close()
    return probe.rows, metrics


def show(metrics: dict[str, Any], row: dict[str, float]) -> None:
    """Prints the line of an iteration."""
    print(
        f"{metrics['iteration']:>3}  success {metrics['success']:.2f}  "
        f"pair accuracy {metrics.get('pair_accuracy', float('nan')):.2f} "
        f"(per turn {metrics.get('pair_accuracy_per_turn', float('nan')):.2f})  "
        + "  ".join(f"{name} {value:+.2f}" for name, value in row.items()),
        flush=True,
    )


def print_variants(config_path: str, names: list[str], seeds: list[int], overrides: list[str]) -> dict[str, Any]:
    """Runs every variant with every seed; prints a markdown table: means over seeds, first / later half of a run."""
    out: dict[str, Any] = {}
    print(f"| variant | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}", flush=True)
    for name in names:
        halves: list[dict[str, list[float]]] = [{}, {}]
        for seed in seeds:
            rows, metrics = probe_run(config_path, [*VARIANTS[name], *overrides, f"seed={seed}"], quiet=True)
            for i, (row, record) in enumerate(zip(rows, metrics, strict=True)):
                for column in COLUMNS:
                    value = row.get(column, record.get(column))
                    if value is not None and np.isfinite(value):
                        halves[2 * i // len(rows)].setdefault(column, []).append(value)
        out[name] = [{column: fmean(values) for column, values in half.items()} for half in halves]
        cells = [" / ".join(f"{half.get(column, float('nan')):.2f}" for half in out[name]) for column in COLUMNS]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--json", help="write every figure to this file")
    parser.add_argument("--variants", help="'all', or names from the table, separated by ';'")
    parser.add_argument("--seeds", default="0", help="of --variants")
    arguments = parser.parse_intermixed_args()
    if arguments.variants:
        names = list(VARIANTS) if arguments.variants == "all" else arguments.variants.split(";")
        seeds = [int(seed) for seed in arguments.seeds.split(",")]
        result = print_variants(arguments.config, names, seeds, arguments.overrides)
        if arguments.json:
            with open(arguments.json, "w") as file:
                json.dump(result, file, indent=1)
        return
    rows, metrics = probe_run(arguments.config, arguments.overrides)
    means = {name: fmean(row[name] for row in rows) for name in rows[0]}
    late = {name: fmean(row[name] for row in rows[len(rows) // 2 :]) for name in rows[0]}
    print("mean      ", "  ".join(f"{name} {value:+.3f}" for name, value in means.items()))
    print("later half", "  ".join(f"{name} {value:+.3f}" for name, value in late.items()))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"mean": means, "later_half": late, "rows": rows, "metrics": metrics}, file)


if __name__ == "__main__":
    main()
