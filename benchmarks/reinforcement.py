"""Does CrossQ learn as well with our BatchRenorm as with sbx's own?

    python benchmarks/reinforcement.py [--seeds=8] [--runs=FOLDER] [--report] [--quick]

Needs `pip install sbx-rl "gymnasium[mujoco]"`. Writes
docs/evidence/reinforcement.{json,png}; `benchmarks/tables.py` writes its tables in
docs/evidence.md. sbx's agent is trained with its own layer and with ours in its place,
with the same epsilon, momentum and warm-up; nothing else differs. Three parts:

- learning: returns of the deterministic policy during training, by seed, and intervals
  of the difference;
- updates: with the same batches for all, how far agents with either layer are from one
  with algorithm 1 of Ioffe's paper, and how far rounding alone takes that one;
- latency: acting on one observation and updating with 256, ours / sbx's.

Each finished run is saved in the folder of `--runs`: a script that was killed goes on,
and one with more `--seeds` adds those. `--report` runs nothing, and reports what was
saved. `--quick` tries everything in some minutes, and writes nothing.
"""

import timing


timing.prepare()

import argparse
import contextlib
import dataclasses
import functools
import json
import sys
import tempfile
import time
from pathlib import Path

import evidence
import flax.linen as nn
import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
from sbx import CrossQ
from sbx.common.jax_layers import BatchRenorm
from sbx.crossq import policies
from tables import REINFORCEMENT

import jbn.linen


OURS, SBX, PAPER = "jbn", "sbx", "algorithm 1"
SIDES = {SBX: (evidence.ORANGE, "--"), OURS: (evidence.BLUE, "-")}
# Where sbx's defaults are too slow for a core: critics have 1,024 units and actors 256,
# the warm-up is 100,000 calls, and there is one update after each step.
WIDTH, WARMUP, EVERY, BATCH = 64, 500, 12, 256
UPDATES = (1, 10, 100, 500)


@dataclasses.dataclass(frozen=True)
class Task:
    """An environment, and how long an agent is in it."""

    name: str
    steps: int
    evaluate: int  # after so many steps each; a multiple of `EVERY`
    episodes: int  # of each evaluation


TASKS = (
    Task("Pendulum-v1", 3_000, 300, 10),
    Task("InvertedPendulum-v5", 3_000, 300, 5),  # of MuJoCo
)
QUICK = tuple(dataclasses.replace(task, steps=240, evaluate=120) for task in TASKS)

# ---- Agents -------------------------------------------------------------------------


class Algorithm1(nn.Module):
    """Batch renormalization as in the paper, line by line, with sbx's warm-up."""

    use_running_average: bool
    momentum: float
    warmup_steps: int

    @nn.compact
    def __call__(self, x):
        """Normalizes rows."""
        features, epsilon = x.shape[-1:], BatchRenorm.epsilon
        mean = self.variable("batch_stats", "mean", jnp.zeros, features)
        var = self.variable("batch_stats", "var", jnp.ones, features)
        step = self.variable("batch_stats", "step", jnp.zeros, (), jnp.int32)
        scale = self.param("scale", nn.initializers.ones, features)
        bias = self.param("bias", nn.initializers.zeros, features)
        running_sd = jnp.sqrt(var.value + epsilon)
        if self.use_running_average:
            return scale * (x - mean.value) / running_sd + bias
        batch_mean, batch_var = x.mean(0), x.var(0)
        sd = jnp.sqrt(batch_var + epsilon)
        warm = step.value >= self.warmup_steps
        r_max, d_max = jnp.where(warm, 3.0, 1.0), jnp.where(warm, 5.0, 0.0)
        r = jnp.clip(sd / running_sd, 1 / r_max, r_max)
        d = jnp.clip((batch_mean - mean.value) / running_sd, -d_max, d_max)
        r, d = jax.lax.stop_gradient((r, d))
        mean.value = self.momentum * mean.value + (1 - self.momentum) * batch_mean
        var.value = self.momentum * var.value + (1 - self.momentum) * batch_var
        step.value += 1
        return scale * ((x - batch_mean) / sd * r + d) + bias


@contextlib.contextmanager
def layer_of(side):
    """Within it sbx's networks are built and traced with this layer."""
    layers = {
        SBX: BatchRenorm,
        OURS: functools.partial(jbn.linen.BatchRenorm, epsilon=BatchRenorm.epsilon),
        PAPER: Algorithm1,
    }
    policies.BatchRenorm = layers[side]
    try:
        yield
    finally:
        policies.BatchRenorm = BatchRenorm


def make_agent(name, side, seed, warmup=WARMUP, **options):
    """A CrossQ agent, whose networks have the layer of this side."""
    agent = CrossQ(
        "MlpPolicy",
        name,
        seed=seed,
        batch_size=BATCH,
        train_freq=EVERY,
        gradient_steps=EVERY,
        policy_kwargs={"net_arch": [WIDTH, WIDTH], "renorm_warmup_steps": warmup},
        **options,
    )
    counter = "steps" if side == SBX else "step"
    for state in (agent.policy.actor_state, agent.policy.qf_state):
        for path, _ in jax.tree.leaves_with_path(state.batch_stats):
            assert path[-1].key in ("mean", "var", "r_max", "d_max", counter), path
    return agent


def share_programs(agent, functions):
    """Has agents of one kind share compiled programs, which JAX finds by functions.

    `functions` is empty for the first of them.
    """
    for owner, name in (
        (agent.policy, "actor_state"),
        (agent.policy, "qf_state"),
        (agent, "ent_coef_state"),
    ):
        state = getattr(owner, name)
        own = {"apply_fn": state.apply_fn, "tx": state.tx}
        setattr(owner, name, state.replace(**functions.setdefault(name, own)))


def mean_return(agent, task, seed):
    """The mean return of some episodes, by the mode of the policy."""
    envs = [gym.make(task.name) for _ in range(task.episodes)]
    observations = np.stack(
        [env.reset(seed=1_000 * seed + i)[0] for i, env in enumerate(envs)]
    )
    returns, going = np.zeros(len(envs)), np.ones(len(envs), bool)
    while going.any():
        actions, _ = agent.predict(observations, deterministic=True)
        for i in np.flatnonzero(going):
            observations[i], reward, ended, cut, _ = envs[i].step(actions[i])
            returns[i] += reward
            going[i] = not (ended or cut)
    return float(returns.mean())


# ---- Measurements -------------------------------------------------------------------


def learn(task, side, seed, functions):
    """Returns during training, from before the first step on."""
    with layer_of(side):
        agent = make_agent(task.name, side, seed, buffer_size=task.steps)
        share_programs(agent, functions)
        curve, seconds = [mean_return(agent, task, seed)], 0.0
        for _ in range(task.steps // task.evaluate):
            start = time.process_time()
            agent.learn(task.evaluate, reset_num_timesteps=False)
            seconds += time.process_time() - start
            curve.append(mean_return(agent, task, seed))
    return {"returns": curve, "cpu_seconds": seconds}


def values_of(side, name, warmup, updates, nudge=False):
    """The critic's values of some transitions after each number of updates."""
    with layer_of(side):
        start = 100 * EVERY  # random actions; the updates come after them
        options = {"learning_starts": start, "buffer_size": start}
        agent = make_agent(name, side, 0, warmup, **options)
        agent.learn(start)
        if nudge:
            state = agent.policy.qf_state
            params = jax.tree.map(lambda v: v, state.params)  # new dicts
            layer = params["VmapCritic_0"]["Dense_0"]
            signs = jax.random.rademacher(jax.random.key(0), layer["kernel"].shape)
            layer["kernel"] *= 1 + 2**-22 * signs
            agent.policy.qf_state = state.replace(params=params)
        np.random.seed(0)  # noqa: NPY002 (the buffer draws from it)
        probe = agent.replay_buffer.sample(BATCH)
        observations, actions = probe.observations.numpy(), probe.actions.numpy()
        found = []
        for i in range(1, max(updates) + 1):
            agent.train(1, BATCH)
            if i in updates:
                state = agent.policy.qf_state
                variables = {"params": state.params, "batch_stats": state.batch_stats}
                q = state.apply_fn(variables, observations, actions, train=False)
                found.append(np.asarray(q, np.float64))
    return found


def follow(name, updates):
    """Distances from an agent with algorithm 1 after updates with the same batches.

    Each is the root of the mean square of the difference of the critics' values, as a
    share of these values' standard deviation.
    """
    agents = {SBX: (SBX, False), OURS: (OURS, False)}
    agents[f"{PAPER}, weights changed by rounding"] = PAPER, True
    rows = []
    for what, warmup in (("warm-up", max(updates) + 1), ("renormalization", 0)):
        reference = values_of(PAPER, name, warmup, updates)
        for who, (side, nudge) in agents.items():
            found = values_of(side, name, warmup, updates, nudge)
            distances = [
                np.sqrt(np.mean((a - b) ** 2)) / np.std(b)
                for a, b in zip(found, reference, strict=True)
            ]
            rows.append({"phase": what, "agent": who, "distance": distances})
    return {"updates": updates, "rows": rows}


def latency(name, rounds):
    """Microseconds of a call, and ours / sbx's."""
    cases = {}
    for side in SIDES:
        with layer_of(side):
            agent = make_agent(name, side, 0, learning_starts=300, buffer_size=1_000)
            agent.learn(310)
            for what, case in calls_of(agent).items():
                case()  # Traces, with this layer.
                cases.setdefault(what, {})[side] = case
    rows = []
    for what, pair in cases.items():
        times = timing.interleaved(
            inside(pair), rounds=rounds, wait=jax.block_until_ready
        )
        micros = {
            side: 1e6 * float(np.median(values)) for side, values in times.items()
        }
        ratios = [a / b for a, b in zip(times[OURS], times[SBX], strict=True)]
        rows.append({"what": what, "microseconds": micros, "ratios": ratios})
    return rows


def inside(pair):
    """The calls, each with its layer in place: an eager call looks it up again."""

    def within(side, case):
        def run():
            with layer_of(side):
                return case()

        return run

    return {side: within(side, case) for side, case in pair.items()}


def calls_of(agent):
    """What an agent does, as functions without arguments."""
    policy, key = agent.policy, jax.random.key(0)
    actor, critic, entropy = policy.actor_state, policy.qf_state, agent.ent_coef_state
    observation = np.asarray(agent._last_obs, np.float32)
    batch = agent.replay_buffer.sample(BATCH)
    x, next_x = batch.observations.numpy(), batch.next_observations.numpy()
    actions = batch.actions.numpy()
    rewards, dones = (v.numpy().ravel() for v in (batch.rewards, batch.dones))
    discounts = np.full(BATCH, agent.gamma, np.float32)
    args = map(jnp.asarray, (x, actions, next_x, rewards, dones, discounts))
    update = (actor, critic, entropy, *args, key)
    acting = (actor, jnp.asarray(observation))
    # Jitted functions keep the function that they were made of.
    act, step = type(policy).select_action, type(agent).update_critic
    return {
        "act, one observation, jitted": lambda: act(*acting),
        "act, one observation, eager": lambda: act.__wrapped__(*acting),
        f"update of the critic, {BATCH} rows, jitted": lambda: step(*update),
        f"update of the critic, {BATCH} rows, eager": lambda: step.__wrapped__(*update),
    }


# ---- Runs that are saved ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Runs:
    """Saved results, by name. `get` computes a missing one if `run_missing` is set."""

    folder: Path
    run_missing: bool

    def get(self, name, run, settings):
        """The result of `run()` with these settings, or `None`."""
        path = self.folder / f"{name}.json"
        settings = json.loads(json.dumps(settings))
        if path.exists():
            saved = json.loads(path.read_text())
            if saved["settings"] == settings:
                return saved["result"]
        if not self.run_missing:
            return None
        result = evidence.plain(run())
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        new.write_text(json.dumps({"settings": settings, "result": result}))
        new.replace(path)  # A killed script leaves no half of a file.
        log(f"{name} ({time.process_time():.0f} s of CPU)")
        return result


def log(text):
    """On stderr: stdout is for the tables."""
    print(text, file=sys.stderr, flush=True)


def learning(runs, tasks, seeds):
    """Curves of the seeds that both sides have finished, by task."""
    found = {task: {side: {} for side in SIDES} for task in tasks}
    functions = {(task, side): {} for task in tasks for side in SIDES}
    for seed in seeds:
        for task in tasks:
            for side in SIDES:
                about = dataclasses.asdict(task)
                about |= {"width": WIDTH, "warmup": WARMUP, "every": EVERY}
                run = functools.partial(learn, task, side, seed, functions[task, side])
                result = runs.get(f"{task.name}-{side}-{seed}", run, about)
                if result is not None:
                    found[task][side][seed] = result
    results = {}
    for task, sides in found.items():
        both = [s for s in seeds if all(s in by_seed for by_seed in sides.values())]
        curves = {
            side: [by_seed[s]["returns"] for s in both]
            for side, by_seed in sides.items()
        }
        spent = {
            side: [by_seed[s]["cpu_seconds"] for s in both]
            for side, by_seed in sides.items()
        }
        if len(both) < 2:
            log(f"{task.name}: fewer than two seeds, left out")
            continue
        results[task.name] = {
            "seeds": both,
            "steps": list(range(0, task.steps + 1, task.evaluate)),
            "returns": curves,
            "differences": differences(curves),
            "milliseconds of CPU a step": {
                side: 1e3 * np.median(values) / task.steps
                for side, values in spent.items()
            },
        }
    return results


def differences(curves):
    """Ours - sbx's, of the end and of the whole curve, with intervals of 95 %.

    `gain` is what sbx's agent learns: all is to be read in shares of it.
    """
    ours, theirs = (np.array(curves[side]) for side in (OURS, SBX))
    scores = {
        "end": lambda v: v[:, -3:].mean(1),  # the last three evaluations
        "whole curve": lambda v: v[:, 1:].mean(1),
    }
    start = theirs[:, 0].mean()
    found = {}
    for name, score in scores.items():
        paired = score(ours) - score(theirs)
        found[name] = {
            SBX: score(theirs).mean(),
            OURS: score(ours).mean(),
            "gain": score(theirs).mean() - start,
            "difference": paired.mean(),
            "bootstrap": bootstrap(paired),
            "t": evidence.student(paired),
        }
    return found


def bootstrap(values, times=10_000):
    """The percentile interval of the mean, of 95 %."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (times, len(values))).mean(1)
    return np.quantile(means, (0.025, 0.975))


# ---- Reports ------------------------------------------------------------------------


def draw(results):
    """Learning curves, and the differences."""
    plt = evidence.style()
    found = results["learning"]
    figure, panels = plt.subplots(1, len(found) + 1, figsize=(12, 4.2), squeeze=False)
    for panel, (name, task) in zip(panels[0], found.items(), strict=False):
        for side, (color, line) in SIDES.items():
            low, middle, high = np.quantile(task["returns"][side], (0.25, 0.5, 0.75), 0)
            panel.plot(task["steps"], middle, line, color=color, label=side)
            panel.fill_between(
                task["steps"], low, high, color=color, alpha=0.2, linewidth=0
            )
        panel.set(xlabel="steps in the environment", xlim=(0, task["steps"][-1]))
        panel.set_title(f"{name}, {len(task['seeds'])} seeds")
        panel.xaxis.set_major_locator(plt.MaxNLocator(4))
    panels[0, 0].set_ylabel("return (median and quartiles)")
    panels[0, 0].legend(loc="lower right")
    last, rows = panels[0, -1], {}
    for name, task in found.items():
        for what, row in task["differences"].items():
            rows[f"{name.split('-')[0]}:\n{what}"] = row
    for i, row in enumerate(reversed(rows.values())):
        share = 100 / row["gain"]
        low, high = (share * np.array(row["t"])).tolist()
        last.plot([low, high], [i, i], color=evidence.BLUE)
        last.plot(share * row["difference"], i, "D", color=evidence.BLUE)
    last.axvline(0, color=evidence.BLACK, linewidth=0.8)
    last.set_yticks(range(len(rows)), list(reversed(rows)))
    last.set_ylim(-0.5, len(rows) - 0.5)
    last.set(xlabel="% of what sbx's agent learns (95 %)")
    last.set_title("jbn - sbx (right: jbn is better)")
    last.grid(axis="y", visible=False)
    return figure


def main():
    """Runs the agents that have no saved result, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=8, help="how many (8)")
    default = Path(tempfile.gettempdir()) / "jbn-reinforcement"
    about = f"folder of finished runs ({default})"
    parser.add_argument("--runs", type=Path, default=default, help=about)
    about = "report the saved runs, without new ones"
    parser.add_argument("--report", action="store_true", help=about)
    about = "try everything in some minutes, write nothing"
    parser.add_argument("--quick", action="store_true", help=about)
    args = parser.parse_args()
    tasks, updates, rounds, seeds = TASKS, UPDATES, 15, args.seeds
    with contextlib.ExitStack() as stack:
        folder = args.runs
        if args.quick:
            tasks, updates, rounds, seeds = QUICK, UPDATES[:2], 3, 2
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runs = Runs(folder, not args.report)
        name = tasks[-1].name
        measure = functools.partial(latency, name, rounds)
        compare = functools.partial(follow, name, updates)
        results = {
            "learning": learning(runs, tasks, range(seeds)),
            "updates": runs.get("updates", compare, {"task": name, "from": PAPER}),
            "latency": runs.get("latency", measure, {"task": name, "rounds": rounds}),
        }
    results = evidence.plain(results)
    evidence.report(
        "reinforcement",
        __doc__.splitlines()[0],
        range(seeds),
        results,
        "\n\n".join(table(results) for table in REINFORCEMENT.values()),
        draw(results),
        [
            f"actor and critics: two layers of {WIDTH}; warm-up: {WARMUP} calls;"
            f" {EVERY} updates after each {EVERY} steps"
        ],
        folder=None if args.quick else evidence.EVIDENCE,
        packages=("sbx-rl", "gymnasium", "mujoco"),
    )


if __name__ == "__main__":
    main()
