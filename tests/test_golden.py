"""The worked numbers of the specification (golden.json), to 1e-5."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import Bandit, per_turn, trajectory, turn

from agentrl.batch import Index, build_batch
from agentrl.batch.index import segment_sum
from agentrl.buffer.pairs import preference_pairs
from agentrl.config import OutcomeConfig, PairConfig, PolicyUpdateConfig, PRMConfig
from agentrl.credit import Signals, load_credit
from agentrl.prm import ImplicitPRM, PairObjective, PairTensors, pair_accuracy, pair_loss
from agentrl.rollout import outcome as outcomes
from agentrl.train.policy_loss import kl_penalty, policy_loss, token_weights


def close(ours, theirs):
    torch.testing.assert_close(
        torch.as_tensor(ours).double(), torch.tensor(theirs, dtype=torch.float64), atol=1e-5, rtol=0
    )


# --- outcome baselines ---


@pytest.mark.parametrize("layout", [list, per_turn], ids=["packed", "per-turn"])
@pytest.mark.parametrize(
    ("section", "key", "options"),
    [
        ("grpo", "std_ddof1_eps1e-6_singleton_zero", {}),
        ("grpo", "std_ddof0_eps1e-6_singleton_zero", {"ddof": 0}),
        ("grpo", "trl_std_ddof1_eps1e-4_singleton_zero", {"eps": 1e-4}),
        ("grpo", "batch_std_ddof1_eps1e-4", {"scale": "batch", "eps": 1e-4}),
        ("grpo", "dr_grpo_no_std_singleton_zero", {"scale": False}),
        ("grpo", "verl_std_ddof1_eps1e-6_singleton_raw", {"singleton": "raw"}),
        ("rloo", "loo_singleton_zero", {}),
        ("rloo", "verl_loop_singleton_raw", {"singleton": "raw"}),
    ],
)
def test_outcome_advantages(golden, section, key, options, layout):
    inputs = golden[section]["inputs"]
    action = turn([1], [2], new_row=True)
    made = [
        trajectory(str(i), group, reward, [action] * (i % 3 + 1))
        for i, (group, reward) in enumerate(zip(inputs["index"], inputs["rewards"], strict=True))
    ]
    index = build_batch(layout(made)).index
    method, checked = load_credit(section, options)
    advantage = method(Signals(index, torch.tensor(inputs["rewards"])), checked)
    expected = torch.tensor(golden[section]["outputs"][key], dtype=torch.float64)
    close(advantage.token, expected[index.traj_of_token].tolist())


# --- OPRL ---


class Case:
    """The specification's six trajectories: groups g0 (A B C D) and g1 (E F)."""

    def __init__(self, section, layout):
        inputs = section["inputs"]
        self.beta = inputs["beta"]
        self.names = list(inputs["trajectories"])
        self.trajectories, prm, old = [], [], []
        for name, entry in inputs["trajectories"].items():
            steps = [
                turn([9], range(len(t["logp_old"])), t["logp_old"], new_row=not i) for i, t in enumerate(entry["turns"])
            ]
            self.trajectories.append(trajectory(name, entry["group"], entry["outcome"], steps))
            prm += [x for t in entry["turns"] for x in t["logp_prm"]]
            old += [x for t in entry["turns"] for x in t["logp_old"]]
        self.trajectories = layout(self.trajectories)
        self.batch = build_batch(self.trajectories)
        self.index = self.batch.index
        self.outcome = torch.tensor([t.outcome for t in self.trajectories], dtype=torch.float64)
        self.log_ratio = torch.tensor(prm, dtype=torch.float64) - torch.tensor(old, dtype=torch.float64)
        self.pairs = preference_pairs(self.trajectories)

    def prm(self, **config):
        model = Bandit([0.0, 0.0])
        return ImplicitPRM(model, model, PRMConfig(beta=self.beta, **config), PairConfig())

    def advantage(self, **options):
        method, checked = load_credit("oprl", options)
        return method(Signals(self.index, self.outcome, token_reward=self.beta * self.log_ratio), checked)


@pytest.fixture(scope="module", params=[list, per_turn], ids=["packed", "per-turn"])
def case(golden, request):
    return Case(golden["oprl"], request.param)


@pytest.fixture(scope="module")
def expected(golden):
    return golden["oprl"]["outputs"]


def test_step_rewards(case, expected):
    ours = segment_sum(case.beta * case.log_ratio, case.index.turn_of_token, case.index.M)
    close(ours, list(itertools.chain(*expected["step_rewards"].values())))


@pytest.mark.parametrize(("score", "key"), [("sum", "traj_score_sum"), ("mean", "traj_score_mean_over_turns")])
def test_trajectory_scores(case, expected, score, key):
    close(case.prm(score=score).trajectory_scores(case.batch, case.log_ratio), list(expected[key].values()))


def test_pairs(case, expected):
    assert [[case.names[p.winner], case.names[p.loser]] for p in case.pairs] == expected["pairs"]


@pytest.mark.parametrize(("score", "prefix"), [("sum", "paper"), ("mean", "code")])
def test_pair_loss_and_its_slope(case, expected, score, prefix):
    """The slope reaches each token times beta, and 1/T with the mean over turns."""
    prm, pairs = case.prm(score=score), PairTensors.of(case.pairs)
    scores = prm.trajectory_scores(case.batch, case.log_ratio).requires_grad_(True)
    loss = pair_loss(scores, pairs)
    loss.backward()
    slope = list(expected[f"{prefix}_prm_dloss_dscore"].values())
    close(loss.detach(), expected[f"{prefix}_prm_loss"])
    close(scores.grad, slope)
    two_pass_loss, weight = prm.token_weights(case.batch, PairObjective(pairs, case.outcome), case.log_ratio)
    close(two_pass_loss, expected[f"{prefix}_prm_loss"])
    share = torch.tensor(slope, dtype=torch.float64)
    if score == "mean":
        share = share / case.index.turns_per_traj
    close(weight / case.beta, share[case.index.traj_of_token].tolist())


def test_pair_accuracy(case, expected):
    scores = case.prm().trajectory_scores(case.batch, case.log_ratio)
    assert pair_accuracy(scores, PairTensors.of(case.pairs)) == expected["prm_pair_accuracy_sum"]


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
def test_episode_advantage(case, expected, estimator):
    per_traj = torch.tensor(list(expected[f"A_E_{estimator}"].values()))
    close(case.advantage(episode=estimator).episode, per_traj[case.index.traj_of_turn].double().tolist())


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("A_S_paper_eq4_ddof1", {}),
        ("A_S_paper_eq4_ddof0", {"ddof": 0}),
        ("A_S_centered_no_std", {"step_norm": "centre"}),
        ("A_S_loo_step", {"step_norm": "loo_step"}),
        ("A_S_loo_trajectory", {"step_norm": "loo_trajectory"}),
    ],
)
def test_step_advantage(case, expected, key, options):
    close(case.advantage(**options).step, expected[key])


@pytest.mark.parametrize(
    ("key", "options"),
    [("A_paper_eq5_grpo_ddof1", {}), ("A_rloo_loo_step", {"episode": "rloo", "step_norm": "loo_step"})],
)
def test_combined_advantage(case, expected, key, options):
    per_turn = torch.tensor(expected[key], dtype=torch.float64)
    close(case.advantage(**options).token, per_turn[case.index.turn_of_token].tolist())


def test_packed_broadcast(case, golden):
    """Every action token of a turn gets the turn's advantage; all other positions of the row get none."""
    example = golden["oprl"]["packed_broadcast"]
    turn_id = example["turn_id"]
    ids = list(range(100, 100 + len(turn_id)))
    steps, start = [], 0
    for t in range(max(turn_id) + 1):
        first, length = turn_id.index(t), turn_id.count(t)
        steps.append(turn(ids[start:first], ids[first : first + length], new_row=t == 0))
        start = first + length
    steps.append(turn(ids[start:], []))
    batch = build_batch([trajectory("A", "g0", 10.0, steps)])
    assert batch.rows == [ids]
    of_traj = case.index.traj_of_token == case.names.index(example["trajectory"])
    advantage = case.advantage().token[of_traj]
    row = torch.zeros(len(ids))
    for column, (token,) in batch.tokens_of_row[0]:
        row[column] = advantage[token]
    close(row, example["token_advantage"])


@pytest.mark.parametrize("order", ["score_then_update", "update_then_score"])
def test_order_of_scoring_and_updating(golden, order):
    """A three-armed bandit: one PRM step by SGD, and the rewards of its arms before or after it."""
    toy = golden["oprl"]["order_toy"]
    winner, loser = toy["pair"]
    prm_model, policy = Bandit([0.0] * 3), Bandit([0.0] * 3)
    prm = ImplicitPRM(prm_model, policy, PRMConfig(beta=toy["beta"], order=order), PairConfig())
    prm.optimizer = torch.optim.SGD(prm_model.parameters(), lr=toy["sgd_lr"])
    uniform = float(torch.log(torch.tensor(1 / 3)))
    arms = [(winner, "g", 1.0), (loser, "g", 0.0), (3 - winner - loser, "alone", 0.0)]
    batch = build_batch(
        [trajectory(str(a), group, outcome, [turn([0], [a], [uniform], new_row=True)]) for a, group, outcome in arms]
    )
    reward, metrics = prm.step(batch, torch.tensor([outcome for _, _, outcome in arms]), policy, [], 0)
    close(metrics["prm_loss"], toy["loss_at_init"])
    close(prm_model.logits.grad, toy["grad_logits"])
    close(prm_model.logits.detach(), toy["logits_after"])
    by_arm = torch.empty(3).index_copy_(0, batch.token_ids, reward)
    close(by_arm, toy[f"rewards_score_{'before' if order == 'score_then_update' else 'after'}_update"])
    assert float(by_arm.mean()) <= 1e-7, "the expected reward under the behaviour policy is never positive"


@pytest.mark.parametrize("centred", [False, True])
def test_expected_step_reward_is_minus_the_kl_and_nothing_once_centred(golden, centred):
    numbers = golden["oprl"]["property_mean_step_reward"]
    p = torch.tensor(numbers["pi_old"])
    policy, prm_model = Bandit(p.log().tolist()), Bandit(torch.tensor(numbers["pi_phi"]).log().tolist())
    prm = ImplicitPRM(prm_model, policy, PRMConfig(beta=numbers["beta"], centred=centred), PairConfig())
    arms = [trajectory(str(a), "g", 0.0, [turn([0], [a], [float(p[a].log())], new_row=True)]) for a in range(3)]
    reward, _ = prm.step(build_batch(arms), torch.zeros(3), policy, [], 0)
    assert reward.abs().max() > 1e-3
    close((p * reward).sum(), 0.0 if centred else numbers["expected_reward"])


def test_pair_rule_with_a_threshold(golden):
    example = golden["oprl"]["pair_rule_threshold_example"]
    rule = OutcomeConfig(rule="return", success_above=example["threshold"])
    made = []
    for i, total in enumerate(example["outcomes"]):
        step = turn([1], [2], new_row=True).model_copy(update={"reward": total})
        played = trajectory(str(i), "g", 0.0, [step])
        reward, success = outcomes.score(played, rule)
        made.append(played.model_copy(update={"outcome": reward, "success": success}))
    assert [i for i, t in enumerate(made) if t.success] == example["positives"]
    assert [[p.winner, p.loser] for p in preference_pairs(made)] == example["pairs"]


# --- policy loss ---


class Loss:
    """The specification's two sequences of four and three tokens, each one turn of one trajectory."""

    def __init__(self, section):
        inputs = section["inputs"]
        self.mask = torch.tensor(inputs["mask"]).bool()
        self.old, self.new, self.reference, self.advantage = (
            torch.tensor(inputs[key], dtype=torch.float64)[self.mask]
            for key in ("logp_old", "logp_new", "logp_ref", "advantage")
        )
        self.traj = torch.arange(2).repeat_interleave(self.mask.sum(1))
        self.step_advantage = torch.tensor(inputs["step_advantage"], dtype=torch.float64)[self.traj]
        self.index = Index(self.traj, torch.arange(2), torch.zeros(2, dtype=torch.int64))

    def __call__(self, new=None, advantage=None, per_token=False, **settings):
        config = PolicyUpdateConfig(**{"dual_clip": None, "clip_low": 0.2, "clip_high": 0.2} | settings)
        weight = token_weights(self.index, config, torch.arange(2)).requires_grad_(True)
        part = policy_loss(
            self.new if new is None else new,
            self.old,
            self.advantage if advantage is None else advantage,
            weight,
            self.traj,
            config,
        )
        part.loss.backward()
        return weight.grad if per_token else part.loss.detach()

    def rows(self, values):
        return torch.tensor(values, dtype=torch.float64)[self.mask].tolist()


@pytest.fixture(scope="module")
def loss(golden):
    return Loss(golden["policy_loss"])


@pytest.fixture(scope="module")
def numbers(golden):
    return golden["policy_loss"]["outputs"]


def test_token_ratio_and_token_loss(loss, numbers):
    config = PolicyUpdateConfig(dual_clip=None)
    part = policy_loss(loss.new, loss.old, loss.advantage, torch.ones(7), loss.traj, config)
    close(part.ratio, loss.rows(numbers["ratio_times_mask"]))
    close(loss(per_token=True), loss.rows(numbers["per_token_loss_eps.2_times_mask"]))


MODES = {
    "token-mean": {},
    "seq-mean-token-sum": {},
    "seq-mean-token-mean": {},
    "seq-mean-token-sum-norm": {"aggregation_length": 4},
}


@pytest.mark.parametrize("mode", MODES)
def test_aggregation(loss, numbers, mode):
    key = "seq-mean-token-sum-norm_L4" if mode == "seq-mean-token-sum-norm" else mode
    settings = {"aggregation": mode, **MODES[mode]}
    close(loss(**settings), numbers["agg_eps.2"][key])
    close(loss(clip_high=0.28, **settings), numbers["agg_clip_higher_.2_.28"][key])
    new = torch.tensor(numbers["dual_clip_case_logp_new"], dtype=torch.float64)[loss.mask]
    close(loss(new=new, dual_clip=3.0, **settings), numbers["dual_clip_case_agg"][key])


def test_dual_clip_per_token(loss, numbers):
    new = torch.tensor(numbers["dual_clip_case_logp_new"], dtype=torch.float64)[loss.mask]
    expected = loss.rows(numbers["dual_clip_case_per_token_times_mask"])
    close(loss(new=new, dual_clip=3.0, per_token=True), expected)


@pytest.mark.parametrize(
    ("ratio", "ratio_key", "loss_key"),
    [
        ("turn", "step_ratio_sum", "step_loss_sum_ratio"),
        ("turn_mean", "step_ratio_length_normalised", "step_loss_length_normalised"),
    ],
)
def test_turn_ratio(loss, numbers, ratio, ratio_key, loss_key):
    config = PolicyUpdateConfig(ratio=ratio, dual_clip=None)
    part = policy_loss(loss.new, loss.old, loss.step_advantage, torch.ones(7), loss.traj, config)
    close(part.ratio, torch.tensor(numbers[ratio_key]).double()[loss.traj].tolist())
    settings = {"ratio": ratio, "aggregation": "turn-mean", "advantage": loss.step_advantage}
    close(loss(per_token=True, **settings), torch.tensor(numbers[loss_key]).double()[loss.traj].tolist())
    close(loss(**settings), sum(numbers[loss_key]) / 2)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimators(loss, numbers, estimator):
    kl = kl_penalty(loss.new, loss.reference, estimator)
    close(kl, loss.rows(numbers[f"kl_{estimator}"]))
    if estimator == "k3":
        close(kl.mean(), numbers["kl_k3_token_mean"])
