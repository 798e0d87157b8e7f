"""Recurrent PPO on a memory task: a cue is shown at the start of an episode and asked for in every step of it."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import LSTM
from torch.nn import functional as F

ENVIRONMENTS, STEPS, EPOCHS = 4, 8, 3
HIDDEN = 10
GAMMA, LAMBDA, CLIP, VALUE, ENTROPY, LARGEST_NORM = 0.9, 0.95, 0.2, 0.5, 0.01, 0.5

State = tuple[Tensor, Tensor]


class Recall:
    """Environments side by side. The action that repeats the cue earns 1, episodes end at random."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.cue = self._draw() < 0.5

    def _draw(self) -> Tensor:
        return torch.rand(ENVIRONMENTS, generator=self.generator)

    def observe(self, new: Tensor) -> Tensor:
        """[B, 2]: the cue in the first step of an episode, else 0; and something else to look at."""
        return torch.stack((torch.where(new, 2.0 * self.cue - 1, 0.0), self._draw()), dim=1)

    def act(self, probability: Tensor) -> Tensor:
        return self._draw() < probability

    def step(self, action: Tensor) -> tuple[Tensor, Tensor]:
        reward, done = (action == self.cue).float(), self._draw() < 0.2
        self.cue = torch.where(done, self._draw() < 0.5, self.cue)
        return reward, done


class Agent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(2, 6)
        self.lstm = LSTM(6, HIDDEN)
        self.policy = nn.Linear(HIDDEN, 1)
        self.value = nn.Linear(HIDDEN, 1)

    def forward(self, observation: Tensor, state: State, done: Tensor) -> tuple[Tensor, Tensor, State]:
        """observation [T, B, 2], done [T, B] -> the logit of action 1 and the value, each [T, B], and the last state."""
        hidden, state = self.recur(torch.tanh(self.encoder(observation)), state, done)
        return self.policy(hidden).squeeze(-1), self.value(hidden).squeeze(-1), state

    def recur(self, x: Tensor, state: State, done: Tensor) -> tuple[Tensor, State]:
        """done[t]: an episode ended right before step t, which starts from a state of zeros."""
        ends = (done[1:].any(dim=1).nonzero().flatten() + 1).tolist()
        out = []
        for start, stop in pairwise([0, *ends, len(x)]):
            kept = (~done[start]).to(x.dtype).view(1, -1, 1)
            part, state = self.lstm(x[start:stop], (kept * state[0], kept * state[1]))
            out.append(part)
        return torch.cat(out), state


@torch.no_grad()
def play(agent: Agent, environment: Recall, state: State, done: Tensor) -> tuple[dict[str, Tensor], State, Tensor]:
    """A rollout that goes on from `state`, with its advantages; the state and the dones to go on from."""
    seen: dict[str, list[Tensor]] = {name: [] for name in ("observation", "done", "action", "reward", "logit", "value")}
    for _ in range(STEPS):
        observation = environment.observe(done).to(state[0].dtype)
        logit, value, state = agent(observation[None], state, done[None])
        action = environment.act(logit[0].sigmoid())
        reward, ended = environment.step(action)
        for name, tensor in zip(seen, (observation, done, action, reward.to(value.dtype), logit[0], value[0])):
            seen[name].append(tensor)
        done = ended
    rollout = {name: torch.stack(tensors) for name, tensors in seen.items()}
    _, following, _ = agent(environment.observe(done).to(state[0].dtype)[None], state, done[None])
    values = torch.cat((rollout["value"], following))
    going_on = (~torch.cat((rollout["done"][1:], done[None]))).to(values.dtype)
    advantage, advantages = torch.zeros_like(values[0]), []
    for t in reversed(range(STEPS)):
        delta = rollout["reward"][t] + GAMMA * going_on[t] * values[t + 1] - values[t]
        advantage = delta + GAMMA * LAMBDA * going_on[t] * advantage
        advantages.insert(0, advantage)
    rollout["advantage"] = torch.stack(advantages)
    return rollout, state, done


def log_probability(logit: Tensor, action: Tensor) -> Tensor:
    return F.logsigmoid(torch.where(action, logit, -logit))


def ppo_loss(agent: Agent, rollout: dict[str, Tensor], state: State) -> Tensor:
    """The clipped surrogate, the value's squared error and the policy's entropy."""
    logit, value, _ = agent(rollout["observation"], state, rollout["done"])
    new, old = (log_probability(logit, rollout["action"]) for logit in (logit, rollout["logit"]))
    ratio, advantage = (new - old).exp(), rollout["advantage"]
    returns = advantage + rollout["value"]
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    surrogate = torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()
    p = logit.sigmoid()
    entropy = -(p * F.logsigmoid(logit) + (1 - p) * F.logsigmoid(-logit)).mean()
    return -surrogate + VALUE * (value - returns).square().mean() - ENTROPY * entropy


def train(dtype: torch.dtype, steps: int, seed: int) -> list[float]:
    torch.manual_seed(seed)
    environment, agent = Recall(seed), Agent().to(dtype)
    optimizer = torch.optim.Adam(agent.parameters(), lr=0.02, eps=1e-5)
    state = (torch.zeros(1, ENVIRONMENTS, HIDDEN, dtype=dtype), torch.zeros(1, ENVIRONMENTS, HIDDEN, dtype=dtype))
    done = torch.ones(ENVIRONMENTS, dtype=torch.bool)
    losses = []
    while len(losses) < steps:
        begin = state
        rollout, state, done = play(agent, environment, begin, done)
        for _ in range(min(EPOCHS, steps - len(losses))):
            optimizer.zero_grad()
            loss = ppo_loss(agent, rollout, begin)
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), LARGEST_NORM)
            optimizer.step()
            losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(*train(torch.float32, 300, 0), sep="\n")
