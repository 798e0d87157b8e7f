"""The T-maze: its rules, resets at the ends of episodes, and that only a memory solves it."""

from __future__ import annotations

from pathlib import Path

import torch

from lstm_triton.recipes import recurrent_rl
from lstm_triton.recipes.recurrent_rl import BUMP, FAIL, FORWARD, LEFT, PAY, RIGHT, Mazes


def mazes(batch: int = 1, corridor: int = 2) -> Mazes:
    return Mazes(batch, corridor, torch.Generator().manual_seed(0))


def test_the_rules() -> None:
    """Walk to the junction, bump into walls, turn as it was said; then a new episode is there already."""
    maze = mazes()
    said = int(maze.said)
    actions = [LEFT, FORWARD, FORWARD, FORWARD, said]
    seen, rewards, dones = [], [], []
    for action in actions:
        seen.append(int(maze.observe()[0].argmax()))
        reward, done = maze.step(torch.tensor([action]))
        rewards.append(round(float(reward), 3))
        dones.append(bool(done))
    assert seen == [said - LEFT, said - LEFT, 2, 3, 3]
    assert rewards == [BUMP, 0.0, 0.0, BUMP, PAY]
    assert dones == [False] * 4 + [True]
    assert maze.place == 0
    assert int(maze.observe()[0].argmax()) == int(maze.said) - LEFT


def test_the_wrong_turn_and_the_end_of_patience() -> None:
    maze = mazes()
    for action in (FORWARD, FORWARD):
        maze.step(torch.tensor([action]))
    wrong = LEFT + RIGHT - int(maze.said)
    reward, done = maze.step(torch.tensor([wrong]))
    assert (float(reward), bool(done)) == (FAIL, True)
    steps = [bool(maze.step(torch.tensor([RIGHT]))[1]) for _ in range(6)]  # never walks
    assert steps == [False] * 5 + [True]


def agent(tmp_path: Path, memoryless: bool = False, *arguments: str) -> recurrent_rl.Agent:
    return recurrent_rl.Agent(
        recurrent_rl.parse(["--small", "--quiet", "--out", str(tmp_path), *arguments]), memoryless
    )


def test_one_call_over_a_rollout_is_the_same_as_step_by_step(tmp_path: Path) -> None:
    """Values that were computed while acting, and those of the update with `reset=`; also in the second rollout."""
    for memoryless in (False, True):
        player = agent(tmp_path, memoryless)
        for _ in range(2):
            rollout, _, _ = player.act()
            assert rollout.dones.any()
            _, values, _ = player.policy(rollout.observations, rollout.starts, rollout.state)
            torch.testing.assert_close(values, rollout.values)
        if not memoryless:
            assert torch.equal(rollout.starts[1:], rollout.dones[:-1])


def test_an_episode_in_words(tmp_path) -> None:
    """The second of a row: from its signal, over the corridor, to the turn that ends it."""
    options = recurrent_rl.parse(["--corridor", "2", "--seq-len", "400", "--quiet", "--out", str(tmp_path)])
    lines = recurrent_rl.episode(recurrent_rl.Agent(options, False))
    assert lines[0].split()[1] in ("left", "right")
    turned = lines[-1].split()[1] == "junction" and lines[-1].split()[-1] in ("+1.0", "-1.0")
    assert turned or len(lines) == 2 * (2 + 1), "it ends with a turn, or when its time is up"
    assert all(float(line.split()[-1]) <= 0 for line in lines[:-1])


def test_only_the_memory_solves_it(tmp_path: Path) -> None:
    returns = {name: agent(tmp_path, name == "memoryless").train() for name in recurrent_rl.POLICIES}
    assert returns["lstm"].last > 0.8
    assert returns["memoryless"].last < 0.3  # half of the turns right pays 0
    assert len(recurrent_rl.return_figure(returns, 3).axes[0].lines) == 3


def test_advantages_stop_at_the_end_of_an_episode(tmp_path: Path) -> None:
    """What comes after a done changes nothing before it."""
    player = agent(tmp_path)
    rollout, after, _ = player.act()
    assert player.loss(rollout, after).requires_grad
    dones = torch.ones_like(rollout.dones)
    losses = [float(player.loss(rollout._replace(dones=dones), after * scale)) for scale in (1.0, 100.0)]
    assert losses[0] == losses[1]
