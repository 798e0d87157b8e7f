"""Reinforcement learning where the policy must remember, with `reset=` for the ends of episodes.

    python -m lstm_triton.recipes.recurrent_rl --out recurrent_rl
    python -m lstm_triton.recipes.recurrent_rl --corridor 20

The T-maze (Bakker, 2002): the first observation of an episode says left or right, then comes a corridor whose steps
all look alike, and at its end only the turn that was said pays 1; the other costs 1, a wall 0.1. Many mazes run at
once, and a rollout of --seq-len steps holds the ends of many episodes: the update runs over all of it in one call,
lstm(x, reset=starts), where starts[t] marks rows whose episode begins at step t. Advantage actor-critic (Mnih et al.,
2016) with generalised advantages (Schulman et al., 2016). The memoryless policy is the same network with a reset
before every step.
Writes to --out: returns.png, returns.csv, policy.pt.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from .. import LSTM
from ..diagnostics.drawing import BLUE, RED, canvas
from .shared.command import Parser, number, ready, require_memory, run, save_table, whole
from .shared.drawing import save
from .shared.training import descend, finite, save_checkpoint

State = tuple[Tensor, Tensor]
FORWARD, LEFT, RIGHT = range(3)
MOVES, SIGHTS = ("forward", "turns left", "turns right"), ("left", "right", "corridor", "junction")
ACTIONS, OBSERVATIONS = len(MOVES), len(SIGHTS)
PAY, FAIL, BUMP = 1.0, -1.0, -0.1  # the said turn, the other one, walking into a wall
BEST = PAY
POLICIES = {"lstm": ("LSTM", BLUE), "memoryless": ("memoryless", RED)}


class Mazes:
    """`batch` T-mazes that begin again by themselves. An episode takes at most twice as many steps as it needs."""

    def __init__(self, batch: int, corridor: int, generator: torch.Generator) -> None:
        self.corridor, self.generator = corridor, generator
        self.said = torch.randint(LEFT, RIGHT + 1, (batch,), generator=generator)
        self.place, self.age = (torch.zeros(batch, dtype=torch.long) for _ in range(2))

    def observe(self) -> Tensor:
        """[B, OBSERVATIONS], one of them 1."""
        seen = torch.where(self.place == self.corridor, 3, 2)
        return F.one_hot(torch.where(self.place == 0, self.said - LEFT, seen), OBSERVATIONS).float()

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """actions [B] -> rewards [B] and dones [B]; where an episode is done, the next one is there already."""
        junction, turns = self.place == self.corridor, actions != FORWARD
        ends = torch.where(actions == self.said, PAY, FAIL)
        rewards = torch.where(junction & turns, ends, torch.where(junction | turns, BUMP, 0.0))
        self.age += 1
        done = (junction & turns) | (self.age >= 2 * (self.corridor + 1))
        self.place = torch.where(done, 0, torch.where(turns | junction, self.place, self.place + 1))
        self.age = torch.where(done, 0, self.age)
        new = torch.randint(LEFT, RIGHT + 1, done.shape, generator=self.generator)
        self.said = torch.where(done, new, self.said)
        return rewards, done


class Policy(nn.Module):
    """LSTM, and linear layers for the logits of the actions and the value of the state."""

    def __init__(self, hidden_size: int, backend: str = "auto") -> None:
        super().__init__()
        self.lstm = LSTM(OBSERVATIONS, hidden_size, backend=backend)
        self.head = nn.Linear(hidden_size, ACTIONS + 1)

    def forward(self, x: Tensor, starts: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """x [T, B, OBSERVATIONS], starts [T, B] -> logits [T, B, ACTIONS], values [T, B], the state after the last."""
        h, state = self.lstm(x, state, reset=starts)
        logits, values = self.head(h).split((ACTIONS, 1), dim=-1)
        return logits, values.squeeze(-1), state


class Rollout(NamedTuple):
    """What happened in T steps: all [T, B], observations [T, B, OBSERVATIONS]; the state before the first of them."""

    observations: Tensor
    starts: Tensor
    actions: Tensor
    rewards: Tensor
    dones: Tensor
    values: Tensor
    state: State


@dataclass
class Returns:
    """Mean return of the episodes that ended in each rollout, against environment steps."""

    steps: list[int] = field(default_factory=list)
    means: list[float] = field(default_factory=list)

    @property
    def last(self) -> float:
        """Mean over the last tenth of training."""
        tail = self.means[-max(1, len(self.means) // 10) :]
        return sum(tail) / len(tail) if tail else math.nan


class Agent:
    """A policy in its mazes. memoryless: it forgets everything before every step."""

    def __init__(self, options: argparse.Namespace, memoryless: bool) -> None:
        torch.manual_seed(options.seed)
        self.options, self.memoryless = options, memoryless
        self.policy = Policy(options.hidden_size, options.backend)
        self.device = ready(options, self.policy.lstm)
        require_memory(24 * options.hidden_size * options.batch * options.seq_len, self.device, "a rollout")
        self.policy.to(self.device)
        self.generator = torch.Generator().manual_seed(options.seed)
        self.mazes = Mazes(options.batch, options.corridor, self.generator)
        self.starts = torch.ones(options.batch, dtype=torch.bool)
        self.state: State = (torch.zeros(1, options.batch, options.hidden_size, device=self.device),) * 2
        self.running = torch.zeros(options.batch)  # return of the episode under way

    @torch.no_grad()
    def act(self) -> tuple[Rollout, Tensor, list[float]]:
        """A rollout, the value of what comes after it [B], and the returns of the episodes that ended in it."""
        rows, ended, before = [], [], self.state
        for _ in range(self.options.seq_len):
            x, starts = self.mazes.observe(), self.starts | self.memoryless
            logits, values, self.state = self.policy(x[None].to(self.device), starts[None].to(self.device), self.state)
            actions = torch.multinomial(logits[0].softmax(-1).cpu(), 1, generator=self.generator).squeeze(1)
            rewards, dones = self.mazes.step(actions)
            rows.append((x, starts, actions, rewards, dones, values[0].cpu()))
            self.starts = dones
            self.running += rewards
            ended += self.running[dones].tolist()
            self.running[dones] = 0
        x, starts = self.mazes.observe(), self.starts | self.memoryless
        _, after, _ = self.policy(x[None].to(self.device), starts[None].to(self.device), self.state)
        observations, begun, actions, rewards, dones, values = (torch.stack(steps) for steps in zip(*rows))
        return Rollout(observations, begun, actions, rewards, dones, values, before), after[0].cpu(), ended

    def loss(self, rollout: Rollout, after: Tensor) -> Tensor:
        """Policy gradient, squared error of the values, and entropy: one call over the whole rollout."""
        options = self.options
        advantages, advantage, following = torch.empty_like(rollout.rewards), torch.zeros_like(after), after
        for t in reversed(range(len(advantages))):
            alive = (~rollout.dones[t]).float()
            error = rollout.rewards[t] + options.discount * alive * following - rollout.values[t]
            advantage = error + options.discount * options.smoothing * alive * advantage
            advantages[t], following = advantage, rollout.values[t]
        wanted = (advantages + rollout.values).to(self.device)
        scaled = ((advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-6)).to(self.device)
        x, starts, actions = (tensor.to(self.device) for tensor in rollout[:3])
        logits, values, _ = self.policy(x, starts, rollout.state)
        logs = logits.log_softmax(-1)
        chosen = logs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        entropy = -(logs.exp() * logs).sum(-1).mean()
        return -(chosen * scaled).mean() + 0.5 * F.mse_loss(values, wanted) - options.entropy * entropy

    def train(self, returns: Returns | None = None) -> Returns:
        options = self.options
        returns = Returns() if returns is None else returns
        optimizer = torch.optim.Adam(self.policy.parameters(), lr=options.learning_rate)
        name = POLICIES["memoryless" if self.memoryless else "lstm"][0]
        with tqdm(total=options.updates, unit="update", desc=name, disable=options.quiet) as bar:
            for update in range(1, options.updates + 1):
                rollout, after, ended = self.act()
                loss = descend(self.policy, optimizer, self.loss(rollout, after), options.clip)
                finite(loss, "loss", update)
                bar.update()
                if ended:
                    returns.steps.append(update * options.batch * options.seq_len)
                    returns.means.append(sum(ended) / len(ended))
                    bar.set_postfix_str(f"return {returns.means[-1]:.2f}", refresh=False)
        return returns


def episode(agent: Agent) -> list[str]:
    """The second episode of a maze of another rollout (the first may have begun before it), a line for every step."""
    rollout, _, _ = agent.act()
    row = int(rollout.dones.float().sum(0).argmax())
    ends = rollout.dones[:, row].nonzero().flatten().tolist()
    first, last = (ends[0] + 1, ends[1]) if len(ends) > 1 else (0, (*ends, len(rollout.dones) - 1)[0])
    lines = []
    for t in range(first, last + 1):
        saw, did = SIGHTS[int(rollout.observations[t, row].argmax())], MOVES[int(rollout.actions[t, row])]
        lines.append(f"sees {saw:9} {did:12} reward {float(rollout.rewards[t, row]):+.1f}")
    return lines


def return_figure(found: dict[str, Returns], corridor: int) -> Figure:
    figure, axes = canvas()
    for key, returns in found.items():
        name, colour = POLICIES[key]
        axes.plot(returns.steps, returns.means, color=colour, label=f"{name}: {returns.last:.2f} at the end")
    axes.axhline(BEST, color="grey", linestyle="--", label="best possible")
    axes.set(xlabel="steps of the environment", ylabel="mean return of an episode", ylim=(-1.6, 1.1))
    axes.set_title(f"T-maze with a corridor of {corridor} steps")
    axes.legend(loc="lower right")
    return figure


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser("recurrent_rl", __doc__)
    parser.option("corridor", 8, whole(), "steps from the first observation to the junction", small=3)
    parser.option("updates", 400, whole(), "rollouts that are learnt from", small=100)
    parser.option("batch", 64, whole(), "mazes at once")
    parser.option("seq_len", 32, whole(), "steps of a rollout", small=16)
    parser.option("hidden_size", 32, whole(), small=16)
    parser.option("learning_rate", 5e-3, number(), "of Adam")
    parser.option("clip", 0.5, number(), "largest norm of all gradients")
    parser.option("discount", 0.98, number(below=1.000001), "of rewards, a step")
    parser.option("smoothing", 0.95, number(least=0, below=1.000001), "lambda of the generalised advantage")
    parser.option("entropy", 0.01, number(least=0), "weight of the policy's entropy")
    parser.common("recurrent_rl")
    options = parser.parse(arguments)
    if options.updates * options.seq_len < 2 * (options.corridor + 1):
        parser.error("--updates times --seq-len must leave time for an episode: twice --corridor, and two steps more")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return run("recurrent_rl", lambda: work(options), options.out)


def work(options: argparse.Namespace) -> None:
    agents = {key: Agent(options, key == "memoryless") for key in POLICIES}
    found = {key: Returns() for key in agents}
    try:
        for key, agent in agents.items():
            agent.train(found[key])
    finally:
        begun = {key: returns for key, returns in found.items() if returns.means}
        if begun:
            save(return_figure(begun, options.corridor), options.out / "returns.png")
    sizes = dict(hidden_size=options.hidden_size)
    save_checkpoint(options.out / "policy.pt", agents["lstm"].policy, sizes=sizes, corridor=options.corridor)
    rows = [(key, step, mean) for key, returns in found.items() for step, mean in zip(returns.steps, returns.means)]
    save_table(options.out / "returns.csv", ("policy", "steps", "mean_return"), rows)
    for key, returns in found.items():
        print(f"{POLICIES[key][0]:10} mean return {returns.last:.3f} over the last tenth of training (best: {BEST:g})")
    print(f"written: returns.png, returns.csv, policy.pt in {options.out}")


if __name__ == "__main__":
    sys.exit(main())
