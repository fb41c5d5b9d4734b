"""The two pictures of docs/ that show no numbers: the swap of SwAV, and a step of each method beside the
others. `python -m benchmarks.figures` writes them.
"""

from benchmarks import draw

COLUMNS = ["crops of an image", "network", "remembered", "assign: when, how", "loss"]
KMEANS, SINKHORN, NEAREST = "orange", "green", "purple"
LANES = [  # method, its five boxes, colour of the fourth, against collapse
    ("DeepCluster", [["one"], ["trunk,", "linear classifier,", "new every epoch"],
                     ["features of all", "images: an extra", "pass per epoch"],
                     ["every epoch:", "k-means of", "whitened features"],
                     ["predict the cluster", "of the image"]],
     KMEANS, "draws equally many images from every cluster"),
    ("ODC", [["one"], ["trunk, MLP,", "linear classifier"],
             ["an embedding and", "the cluster of", "every image"],
             ["every step: nearest", "centroid; centroids", "every 10 steps"],
             ["predict the cluster", "of the last visit,", "weighted by its size"]],
     NEAREST, "dissolves small clusters and splits the largest; large clusters weigh less"),
    ("SeLa", [["one"], ["trunk,", "10 linear heads"],
              ["features of all", "images: an extra", "pass, 100 in all"],
              ["100 times:", "Sinkhorn over all", "images, per head"],
              ["predict the label,", "mean over heads"]],
     SINKHORN, "gives every label equally many images"),
    ("DeepCluster-v2", [["2 large, 6 small"], ["trunk, MLP,", "3 heads of centroids"],
                        ["embeddings of an", "epoch's own steps"],
                        ["every epoch:", "spherical k-means,", "for each head"],
                        ["all crops predict the", "cluster of the image"]],
     KMEANS, "clusters anew every epoch: k-means cuts whatever there is into K parts"),
    ("SeLa-v2", [["2 large, 4 small"], ["trunk, MLP,", "3 heads of learnt", "prototypes"],
                 ["embeddings of an", "epoch's own steps"],
                 ["every epoch:", "Sinkhorn over all", "images, per head"],
                 ["all crops predict the", "label of the image"]],
     SINKHORN, "gives every label equally many images"),
    ("SwAV", [["2 large, 6 small"], ["trunk, MLP,", "learnt prototypes"],
              ["nothing, or a queue", "of past embeddings"],
              ["every step: Sinkhorn", "over the batch"],
              ["each crop predicts", "the codes of the", "other large crops"]],
     SINKHORN, "gives every prototype equal mass in every batch"),
]


def steps(found=None):
    """Six lanes, five boxes each; over the boxes the way of the scores from the network to the loss."""
    size, left, wide, gap, high, lane = 14, 14, 160, 20, 66, 132
    places = [left + (wide + gap) * i for i in range(len(COLUMNS))]
    parts = [draw.text(x + wide / 2, 26, title, "middle", "grey") for x, title in zip(places, COLUMNS)]
    for number, (method, boxes, colour, safeguard) in enumerate(LANES):
        top = 40 + lane * number
        parts.append(draw.path([(left, top), (places[-1] + wide, top)], "stroke: var(--grid)"))
        parts.append(draw.text(left, top + 22, f'<tspan font-weight="bold">{method}</tspan>'))
        y = top + 34
        middle = y + high / 2
        for i, (x, words) in enumerate(zip(places, boxes)):
            passing = "extra" in " ".join(words)
            parts += draw.box(x, y, wide, high, words, colour if i == 3 else "grey", "5 4" * passing, size)
            if i:
                parts += draw.arrow([(x - gap, middle), (x, middle)])
        out, into = places[1] + wide / 2, places[4] + wide / 2
        parts += draw.arrow([(out, y), (out, y - 12), (into, y - 12), (into, y)], "blue")
        parts.append(draw.text(places[2] + wide / 2, y - 8, "scores", "middle", "blue"))
        parts.append(draw.text(left, y + high + 20, f"Against collapse: {safeguard}."))
    return draw.page(places[-1] + wide + left, 40 + lane * len(LANES), parts, size)


def sub(letter, of):
    return f'{letter}<tspan dy="4" font-size="12">{of}</tspan>'


def swap(found=None):
    """Two crops of an image, from left to right; on the right each prediction is held to the other's code."""
    size, high, middle, rows = 16, 44, 160, {"s": 84, "t": 236}  # the middle of each row
    inner, outer = {}, {}
    parts = draw.box(8, middle - 22, 62, high, ["image"], size=size)
    parts += draw.box(180, 40, 66, 240, ["trunk", "and", "head"], size=size)
    parts += draw.box(312, middle - 22, 96, high, ["prototypes"], size=size)
    for crop, y in rows.items():
        top, down = y - high / 2, 1 if crop == "s" else -1  # towards the middle
        parts += draw.arrow([(39, middle - 22 * down), (39, y), (90, y)])
        parts += draw.box(90, top, 66, high, [f"crop {crop}"], size=size)
        parts += draw.arrow([(156, y), (180, y)])
        parts += draw.arrow([(246, y), (266, y)])
        parts += draw.box(266, top, 34, high, [sub("z", crop)], size=size)
        parts += draw.arrow([(300, y), (325, y)])
        parts += draw.box(325, top, 70, high, ["scores"], size=size)
        parts += draw.arrow([(360, middle - 22 * down), (360, y + 22 * down)])
        outer[crop], inner[crop] = y - 36 * down, y + 30 * down
        for words, colour, place in ((["Sinkhorn:", f"code {sub('q', crop)}"], "green", outer[crop]),
                                     (["softmax:", sub("p", crop)], "blue", inner[crop])):
            parts += draw.arrow([(395, y), (409, y), (409, place), (424, place)])
            parts += draw.box(424, place - 25, 88, 50, words, colour, size=size)
    for code, prediction, x in (("s", "t", 546), ("t", "s", 530)):
        parts += draw.arrow([(512, outer[code]), (x, outer[code]), (x, inner[prediction]),
                             (512, inner[prediction])], "orange")
    for y, words in ((322, "Orange: each softmax must predict the code of the other crop."),
                     (346, "Codes are answers: no gradient flows back through them.")):
        parts.append(draw.text(8, y, words))
    return draw.page(560, 358, parts, size)
