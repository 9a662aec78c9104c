"""Does CrossQ learn as well with our BatchRenorm as with sbx's own?

    python benchmarks/reinforcement.py [--seeds=8] [--runs=FOLDER] [--report] [--quick]

Needs `pip install sbx-rl "gymnasium[mujoco]"`. Writes
docs/evidence/reinforcement.{json,png}; `benchmarks/tables.py` writes its tables in
docs/evidence.md. sbx's agent is trained with its own layer and with ours in its place,
with the same epsilon, momentum and warm-up; nothing else differs. Three parts:

- learning: returns of the deterministic policy during training, by seed, and intervals
  of the difference;
- updates: how far two agents are apart that were updated with the same batches, and how
  far rounding alone takes them;
- latency: acting on one observation and updating with 256, ours / sbx's.

Each finished run is saved in the folder of `--runs`: a script that was killed goes on,
and one with more `--seeds` adds those. `--report` runs nothing, and reports what was
saved. `--quick` tries everything in two minutes, and writes nothing.
"""

import os

import timing


# XLA logs an error for each program that it reads from the compilation cache.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
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
import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from sbx import CrossQ
from sbx.crossq import policies
from tables import REINFORCEMENT

import jbn.linen


OURS, SBX = "jbn", "sbx"
SIDES = {SBX: (evidence.ORANGE, "--"), OURS: (evidence.BLUE, "-")}
NUDGED = "sbx, a weight changed by rounding"
# sbx's default, critics of 1,024 units and actors of 256, is too slow for one core.
WIDTH, WARMUP, BATCH = 128, 1_000, 256
UPDATES = (1, 10, 100, 1_000)


@dataclasses.dataclass(frozen=True)
class Task:
    """An environment, and how long an agent is in it."""

    name: str
    steps: int
    every: int  # steps between evaluations
    episodes: int  # of each evaluation


TASKS = (Task("Pendulum-v1", 5_000, 500, 10), Task("HalfCheetah-v5", 8_000, 1_000, 3))
QUICK = (Task("Pendulum-v1", 400, 200, 2), Task("HalfCheetah-v5", 400, 200, 1))

# ---- Agents -------------------------------------------------------------------------


@contextlib.contextmanager
def layer_of(side):
    """Within it sbx's networks are built and traced with this layer."""
    own = policies.BatchRenorm
    if side == OURS:
        ours = functools.partial(jbn.linen.BatchRenorm, epsilon=own.epsilon)
        policies.BatchRenorm = ours
    try:
        yield
    finally:
        policies.BatchRenorm = own


def make_agent(name, side, seed, warmup=WARMUP, **options):
    """A CrossQ agent, whose networks have the layer of this side."""
    agent = CrossQ(
        "MlpPolicy",
        name,
        seed=seed,
        batch_size=BATCH,
        policy_kwargs={"net_arch": [WIDTH, WIDTH], "renorm_warmup_steps": warmup},
        **options,
    )
    counter = {SBX: "steps", OURS: "step"}[side]
    for state in (agent.policy.actor_state, agent.policy.qf_state):
        for path, _ in jax.tree.leaves_with_path(state.batch_stats):
            assert path[-1].key in ("mean", "var", "r_max", "d_max", counter), path
    return agent


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


# ---- What is measured ---------------------------------------------------------------


def learn(task, side, seed):
    """Returns during training, from before the first step on."""
    with layer_of(side):
        agent = make_agent(task.name, side, seed, buffer_size=task.steps)
        curve, seconds = [mean_return(agent, task, seed)], 0.0
        for _ in range(task.steps // task.every):
            start = time.process_time()
            agent.learn(task.every, reset_num_timesteps=False)
            seconds += time.process_time() - start
            curve.append(mean_return(agent, task, seed))
    return {"returns": curve, "cpu_seconds": seconds}


def values_of(side, name, warmup, updates, nudge=False):
    """The critic's values of some transitions after each number of updates."""
    with layer_of(side):
        start = 1_000  # transitions of random actions
        agent = make_agent(name, side, 0, warmup, learning_starts=start)
        agent.learn(start)
        if nudge:
            state = agent.policy.qf_state
            kernel = lambda path: path[-2:] == ("Dense_0", "kernel")
            params = jax.tree.map_with_path(
                lambda path, v: (
                    v.at[:, 0, 0].mul(1 + 2**-22)
                    if kernel(tuple(key.key for key in path))
                    else v
                ),
                state.params,
            )
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
    """Distances from sbx's agent after updates with the same batches.

    Each is the root of the mean square of the difference of the critics' values, as a
    share of these values' standard deviation.
    """
    rows = []
    for what, warmup in (("warm-up", max(updates) + 1), ("renormalization", 0)):
        reference = values_of(SBX, name, warmup, updates)
        for who, side, nudge in ((OURS, OURS, False), (NUDGED, SBX, True)):
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
            agent = make_agent(name, side, 0, learning_starts=300)
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
    """Results by name, in files; `get` runs what is missing, if it may."""

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
        jax.clear_caches()
        log(f"{name} ({time.process_time():.0f} s of CPU)")
        return result


def log(text):
    """On stderr: stdout is for the tables."""
    print(text, file=sys.stderr, flush=True)


def learning(runs, tasks, seeds):
    """Curves of the seeds that both sides have finished, by task."""
    found = {task: {side: {} for side in SIDES} for task in tasks}
    for seed in seeds:
        for task in tasks:
            for side in SIDES:
                about = {**dataclasses.asdict(task), "width": WIDTH, "warmup": WARMUP}
                run = functools.partial(learn, task, side, seed)
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
            "steps": list(range(0, task.steps + 1, task.every)),
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
            "t": student(paired),
        }
    return found


def bootstrap(values, times=10_000):
    """The percentile interval of the mean, of 95 %."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (times, len(values))).mean(1)
    return np.quantile(means, (0.025, 0.975))


def student(values):
    """Student's interval of the mean: with few seeds the bootstrap's is too narrow."""
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
    return np.mean(values) + np.array([-half, half])


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
    last.set(xlabel="% of what sbx's agent gains, with t intervals")
    last.set_title("jbn - sbx (right: jbn is better)")
    last.grid(axis="y", visible=False)
    return figure


def main():
    """Runs what is missing, and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=8, help="how many (8)")
    default = Path(tempfile.gettempdir()) / "jbn-reinforcement"
    about = f"folder of finished runs ({default})"
    parser.add_argument("--runs", type=Path, default=default, help=about)
    about = "run nothing, report what was saved"
    parser.add_argument("--report", action="store_true", help=about)
    about = "try everything in two minutes, write nothing"
    parser.add_argument("--quick", action="store_true", help=about)
    args = parser.parse_args()
    tasks, updates, rounds, seeds = TASKS, UPDATES, 15, args.seeds
    with contextlib.ExitStack() as stack:
        folder = args.runs
        if args.quick:
            tasks, updates, rounds, seeds = QUICK, UPDATES[:2], 3, 2
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        # An agent is compiled anew for each seed, from the same programs.
        jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
        runs = Runs(folder, not args.report)
        name = tasks[-1].name
        measure = functools.partial(latency, name, rounds)
        compare = functools.partial(follow, name, updates)
        results = {
            "learning": learning(runs, tasks, range(seeds)),
            "updates": runs.get("updates", compare, {"task": name, "at": updates}),
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
        [f"actor and critics of two layers of {WIDTH}; warm-up of {WARMUP} calls"],
        folder=None if args.quick else evidence.EVIDENCE,
        packages=("sbx-rl", "gymnasium", "mujoco"),
    )


if __name__ == "__main__":
    main()
