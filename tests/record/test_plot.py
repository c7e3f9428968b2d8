"""The loss plot is a real picture, and absent where there is nothing to draw."""

from luthier.record.plot import plot_loss


def test_a_plot_is_a_png_with_ink_on_it(tmp_path):
    from matplotlib import image

    metrics = [{"step": s, "loss": 3 / s} for s in range(1, 30)] + [{"step": 29, "eval_loss": 0.2}]
    assert plot_loss(metrics, "quickstart", tmp_path / "loss.png")
    pixels = image.imread(tmp_path / "loss.png")
    assert pixels.shape[1] > 800
    assert pixels[..., :3].std() > 0.02


def test_no_metrics_no_plot(tmp_path):
    assert not plot_loss([{"step": 1, "learning_rate": 1.0}], "empty", tmp_path / "loss.png")
    assert not list(tmp_path.iterdir())


def test_rewards_are_drawn_in_place_of_a_loss_that_says_nothing(tmp_path):
    metrics = [{"step": s, "loss": 0.0, "reward": -1 / s} for s in range(1, 9)]
    assert plot_loss([*metrics, {"step": 8, "eval_reward": None}], "grpo", tmp_path / "loss.png")
