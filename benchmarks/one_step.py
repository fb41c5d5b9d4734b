"""One training step of SwAV in numbers: the blocks of docs/one_step.md.

    python -m benchmarks.one_step

The step is that of swav.py, by its own functions, in float64. What the page does by hand (Sinkhorn's two
divisions, the gradient) is done by hand here too, and compared with what the functions give.
"""

import dataclasses
import random
import re

import torch

import swav
from benchmarks.report import ROOT, between
from common.engine.files import writing
from common.engine.options import recipe
from common.multicrop import to_device
from common.optim import LARC
from common.sinkhorn import sinkhorn

PAGE = ROOT / "docs/one_step.md"
COLOURS = [(230, 70, 60), (200, 110, 70), (90, 200, 70), (120, 170, 60), (60, 90, 220), (130, 130, 140)]
B, V, U, K, D, HIDDEN = 6, 4, 2, 5, 3, 4
CONFIG = dataclasses.replace(
    recipe(swav.Config, swav.RECIPES, "shapes"), crops=(U, V - U), sizes=(2, 1), hidden=HIDDEN, dim=D,
    prototypes=K, head_norm=False, epsilon=0.25, temperature=0.5, sinkhorn_iterations=3, lr=48.0)
TOLERANCE = 0.0011  # of a number on the page: another CPU may round its last digit the other way


class MeanColour(torch.nn.Module):
    """A trunk without weights: the mean of the pixels, F = 3 numbers."""

    feature_dim = 3

    def forward(self, x):  # (B, 3, s, s)
        return x.mean((2, 3))


def batch(rng):
    """Crops as a loader gives them, [(V_r, B, 3, s, s)] uint8: an image's colour, each pixel a little off."""
    crops = []
    for number, size in zip(CONFIG.crops, CONFIG.sizes):
        pixels = [min(255, max(0, channel + rng.randint(-40, 40))) for _ in range(number)
                  for colour in COLOURS for channel in colour for _ in range(size * size)]
        crops.append(torch.tensor(pixels, dtype=torch.uint8).view(number, B, 3, size, size))
    return crops


def network(rng):
    """swav.Model on that trunk. Its weights are tenths, for pencils."""
    model = swav.Model(CONFIG, MeanColour()).double()
    with torch.no_grad():
        for weight in model.parameters():
            tenths = [rng.randint(-10, 10) / 10 for _ in range(weight.numel())]
            weight.copy_(torch.tensor(tenths, dtype=torch.float64).view_as(weight))
    model.normalize_prototypes()
    return model


# ---------------------------------------------------------------------------------------------------- blocks


def numbers(row):
    return "".join(f"{round(x, 3) + 0.0:8.3f}" for x in row.tolist())  # no -0.000


def beside(names, *blocks):
    """Lines: titled blocks (R, C) beside each other, each row after its name."""
    wide = max(map(len, names))
    widths = [max(8 * block.shape[1], len(title) + 1) for title, block in blocks]
    lines = [" " * wide + " |".join(f" {title}".ljust(width) for (title, _), width in zip(blocks, widths))]
    for name, *rows in zip(names, *(block for _, block in blocks)):
        lines.append(name.ljust(wide) + " |".join(numbers(row).ljust(width)
                                                  for row, width in zip(rows, widths)))
    return [line.rstrip() for line in lines]


def summed(block):
    """A block (B, K) with the sum of each row behind it and of each column below it."""
    block = torch.cat([block, block.sum(1, keepdim=True)], 1)
    return torch.cat([block, block.sum(0, keepdim=True)])


def agree(by_hand, by_function):
    torch.testing.assert_close(by_hand, by_function, rtol=1e-9, atol=1e-9)


def blocks():
    """{name of a block of the page: its lines}, from crops to the prototypes after the step."""
    rng, found = random.Random(1440), {}
    images, views = [f"image {b}" for b in range(B)], [f"crop {v}" for v in range(V)]
    crops, model = batch(rng), network(rng)

    neutral = torch.tensor([1.0, 1, 1, 0, -1, 0, 0, 0]).expand(V, B, 8)  # no jitter, grey, blur
    moved = to_device(crops, neutral, torch.device("cpu"), torch.float64)
    lines = ["crops of image 0, uint8: (2, 3, 2, 2) large and (2, 3, 1, 1) small"]
    for v in range(V):
        pixels = crops[v // U][v % U, 0].flatten(1)  # (3, s s)
        channels = (f"{name} {' '.join(f'{x:3}' for x in row)}"
                    for name, row in zip(("red", "green", "blue"), pixels.tolist()))
        lines.append(f"{views[v]}   {'   '.join(channels)}")
    found["crops"] = lines

    features = torch.cat([model.backbone(group) for group in moved])  # (V B, F)
    z, scores = model(moved)
    first, _, last = model.projection_head
    prototypes = model.prototypes.weight
    found["features"] = beside(images, *zip(views, features.view(V, B, -1)))
    hidden = first(features[0]).relu()
    out = last(hidden)
    found["embeddings"] = [
        *beside([f"unit {j}" for j in range(HIDDEN)], ("first layer (4, 3)", first.weight),
                ("its bias (4,)", first.bias[:, None]), ("second layer, transposed (4, 3)", last.weight.T)),
        f"bias of the second layer (3,): {numbers(last.bias)}",
        "", "embeddings z (V B, D) = (24, 3)",
        *beside(images, *zip(views, z.view(V, B, D))),
        f"image 0, crop 0: ReLU of the first layer {numbers(hidden)}; second layer {numbers(out)};",
        f"its length {f'{out.norm():.3f}'}; divided by it {numbers(out / out.norm())}"]

    z, scores = z.view(V, B, D), scores.view(V, B, K)
    found["scores"] = [
        *beside([f"prototype {k}" for k in range(K)], ("C (K, D) = (5, 3)", prototypes)),
        "", "scores (V, B, K) = (4, 6, 5)",
        *beside(images, *zip(views[:U], scores)), *beside(images, *zip(views[U:], scores[U:]))]

    # assign, half an iteration at a time
    memory = swav.Queue(0, U, D, dtype=torch.float64)
    codes = swav.assign(scores[:U].detach(), memory, prototypes, CONFIG.epsilon, CONFIG.sinkhorn_iterations)
    q, sums = (scores[0].detach() / CONFIG.epsilon).exp(), [*images, "sum"]
    softmax = q / q.sum(1, keepdim=True)
    agree(softmax, sinkhorn(scores[0], CONFIG.epsilon, 0))
    found["start"] = beside(sums, ("exp(scores / epsilon), and the row's sum", summed(q)),
                            ("a softmax: each row / its sum", summed(softmax)))
    halves = []
    for t in range(CONFIG.sinkhorn_iterations):
        halves.append((f"iteration {t + 1}: each column / its sum", summed(q / q.sum(0))))
        q = q / q.sum(0)
        q = q / q.sum(1, keepdim=True)
        halves.append((f"iteration {t + 1}: then each row / its sum", summed(q)))
        agree(q, sinkhorn(scores[0], CONFIG.epsilon, t + 1))
    agree(q, codes[0])
    found["iterations"] = [line for pair in zip(halves[::2], halves[1::2]) for line in beside(sums, *pair)]
    found["codes"] = beside(images, *((f"codes of {views[u]}", codes[u]) for u in range(U)))

    # prediction_loss: every pair of a code and a crop
    loss = swav.prediction_loss(scores, codes, CONFIG.temperature)
    p = (scores / CONFIG.temperature).softmax(2)  # (V, B, K)
    pairs = -torch.einsum("ubk,vbk->uvb", codes, p.log())  # (U, V, B)
    used = ~torch.eye(V, dtype=torch.bool)[:U]  # (U, V): not a crop's own code
    agree(pairs.mean(2)[used].mean(), loss)
    terms = " + ".join(f"{a:.3f} * {b:.3f}" for a, b in zip(codes[0, 0], -p[1, 0].log()))
    found["loss"] = [
        *beside(views, ("p of image 0 (V, K)", p[:, 0])),
        f"crop 1 predicts the code of crop 0: {terms} = {pairs[0, 1, 0]:.3f}",
        *beside([f"code of crop {u}" for u in range(U)],
                ("image 0: by crop 0, 1, 2, 3", pairs[:, :, 0]), ("mean of the images", pairs.mean(2))),
        f"loss = ({' + '.join(f'{x:.3f}' for x in pairs.mean(2)[used])}) / {int(used.sum())} = {loss:.3f}"]

    # gradient of the scores, and of the prototypes
    wanted = torch.einsum("uv,ubk->vbk", used.double(), codes)  # (V, B, K): sum of the codes to predict
    count = used.sum(0)[:, None, None]  # (V, 1, 1): how many they are
    by_hand = (count * p - wanted) / (int(used.sum()) * B * CONFIG.temperature)  # (V, B, K)
    of_scores, = torch.autograd.grad(loss, scores, retain_graph=True)
    agree(by_hand, of_scores)
    optimizer = LARC(model.parameters(), CONFIG.lr, CONFIG.momentum, CONFIG.weight_decay)
    optimizer.zero_grad()
    loss.backward()
    gradient, before = prototypes.grad, prototypes.detach().clone()
    agree(torch.einsum("vbk,vbd->kd", by_hand, z), gradient)
    found["gradient"] = [
        *beside(views, ("100 * gradient of image 0's scores (V, K)", 100 * of_scores[:, 0])),
        *beside([f"prototype {k}" for k in range(K)], ("gradient of C (K, D)", gradient))]

    optimizer.step()
    after = prototypes.detach().clone()
    length = before.norm() / (gradient.norm() + CONFIG.weight_decay * before.norm())
    step = CONFIG.lr * 0.001 * length * (gradient + CONFIG.weight_decay * before)
    torch.testing.assert_close(before - step, after, rtol=0, atol=1e-6)
    model.normalize_prototypes()
    _, again = model(moved)
    lower = swav.prediction_loss(again.view(V, B, K), codes, CONFIG.temperature)
    assert lower < loss
    found["update"] = [
        f"|C| = {before.norm():.3f}   |gradient| = {gradient.norm():.3f}   step = {CONFIG.lr:.0f} * 0.001 * "
        f"{before.norm():.3f} / {gradient.norm():.3f} * gradient",
        *beside([f"prototype {k}" for k in range(K)], ("before", before), ("minus the step", after),
                ("at length 1, next step", prototypes)),
        f"loss of these crops and codes: {loss:.3f} before, {lower:.3f} after"]
    return found


def written(page):
    """The page with its blocks as they are computed."""
    for name, lines in blocks().items():
        page = between(page, name, "\n".join(["```", *lines, "```"]), "one_step")
    return page


def same(one, other):
    """Whether two texts have the same words, and numbers that differ by no more than a last digit."""
    number = re.compile(r"-?\d+\.\d+")
    words = [number.sub("#", text).split() for text in (one, other)]
    values = [[float(x) for x in number.findall(text)] for text in (one, other)]
    return words[0] == words[1] and all(abs(a - b) <= TOLERANCE for a, b in zip(*values))


def main():
    page = written(PAGE.read_text())
    with writing(PAGE, text=True) as file:
        file.write(page)
    print(f"written: docs/{PAGE.name}")


if __name__ == "__main__":
    main()
