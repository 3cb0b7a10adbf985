"""What frames show, found by colour and outline, and whether it matches a text. Lengths are the toy
world's."""

import math
from collections import namedtuple
from itertools import permutations

import numpy as np
import torch
import torch.nn.functional as F

from toy.world import BACKGROUNDS, COLORS, MOTIONS, SHAPES, distances, trace

Thing = namedtuple("Thing", "shape color x y r mask")  # what stands in a frame; mask: its pixels [64, 64]
Seen = namedtuple("Seen", "background things ground")  # ground: [64, 64], True where no thing is near


def shrink(frames):
    """Frames [N, 3, H, W] in [-1, 1] -> [N, 3, 64, 64] in [0, 255]."""
    return F.interpolate((frames.float().clamp(-1, 1) + 1) * 127.5, (64, 64), mode="area")


def detect(frames):
    """What frames [N, 3, H, W] in [-1, 1] show -> N Seens. A colour, a shape or a background that is none of
    the toy world's is "unclear"."""
    names, grounds = [*BACKGROUNDS, *COLORS], len(BACKGROUNDS)
    palette = torch.tensor([*BACKGROUNDS.values(), *COLORS.values()], dtype=torch.float32)
    distance = torch.cdist(shrink(frames).flatten(2).transpose(1, 2), palette)  # [N, 64 * 64, colours]
    least, nearest = distance.min(2)
    sure = F.one_hot(nearest, len(names)).bool() & (least < 60)[..., None]
    present = sure.sum(1) >= 20  # edges mix colours: they are taken for those that cover an area
    ground = sure[..., :grounds].sum(1).argmax(1)
    present[:, :grounds] = F.one_hot(ground, grounds).bool()
    nearest = distance.masked_fill(~present[:, None], math.inf).argmin(2)
    labels, sure = components((nearest >= grounds).view(-1, 1, 64, 64)), sure.unflatten(1, (64, 64))
    found = []
    for label, pure, number in zip(labels[:, 0], sure, ground):
        values, areas = label.unique(return_counts=True)
        masks = [label == value for value, area in zip(values, areas) if value and area >= 25]
        covered = sum(masks, torch.zeros(1, 64, 64, dtype=torch.bool)).float()
        free = F.max_pool2d(covered, 5, 1, 2)[0] == 0
        stains = (free & ~pure[..., number]).sum()
        background = names[number] if stains < 0.01 * 64 * 64 else "unclear"
        found.append(Seen(background, sorted(identify(mask, pure, names) for mask in masks), free))
    return found


def components(mask):
    """Number the connected parts of a mask [N, 1, H, W]; 0 is outside. The largest number spreads."""
    labels = torch.arange(1.0, mask[0].numel() + 1).view(mask[:1].shape) * mask
    while True:
        spread = F.max_pool2d(labels, 3, 1, 1) * mask
        if torch.equal(spread, labels):
            return labels
        labels = spread


def identify(mask, sure, names):
    """The Thing that covers a mask [64, 64]: its colour is `sure` [64, 64, colours] in most of it, and
    its shape, drawn with the same centre and area, overlaps it most."""
    shares = sure[mask].float().mean(0)
    color = names[shares.argmax()] if shares.max() > 0.6 else "unclear"
    (y, x), area = (mask.nonzero() + 0.5).mean(0), mask.sum()
    choices = [(0.75, "unclear", (area / math.pi).sqrt())]
    for shape in SHAPES:
        r = (area / UNITS[shape]).sqrt()
        if r > 6.5:  # a small diamond is no tiny circle
            choices.append((overlap(mask, shape, x, y, r), shape, r))
    _, shape, r = max(choices)
    return Thing(shape, color, x.item(), y.item(), r.item(), mask)


def outline(shape, x, y, r):
    """The pixels [64, 64] of a shape."""
    pixel = torch.arange(64) + 0.5
    return SHAPES[shape]((pixel - x).abs(), pixel[:, None] - y, r) < 0


UNITS = {shape: outline(shape, 32, 32, 28).sum() / 28**2 for shape in SHAPES}  # areas with a radius of 1


def overlap(mask, shape, x, y, r):
    """Intersection over union of a mask [64, 64] and a shape."""
    ideal = outline(shape, x, y, r)
    return ((ideal & mask).sum() / (ideal | mask).sum()).item()


def looks(things):
    """Shape and colour of each, in a fixed order."""
    return sorted((thing.shape, thing.color) for thing in things)


def is_there(thing, item, place):
    """Is a thing an object of a text, as far as it tells? It lies within 4 pixels of its place (x, y, r)
    and within 2.5 of its radius: halfway from small to large."""
    x, y, r = place
    near = item.cell is None or math.hypot(thing.x - x, thing.y - y) < 4
    large = item.size is None or abs(thing.r - r) < 2.5
    return near and large and thing.shape == item.shape and item.color in (None, thing.color)


def in_place(things, objects, time):
    """Are the things of a frame the objects, each where it is at that moment, whatever their sizes?"""
    places = [trace(item, time) for item in objects]
    sizeless = [item._replace(size=None) for item in objects]
    orders = permutations(things) if len(things) == len(objects) else ()
    return any(all(map(is_there, order, sizeless, places)) for order in orders)


def pairings(seen, told):
    """Things of the first and of the last frame, in all orders that have the told shapes and colours."""
    begin, end = seen[0].things, seen[-1].things
    if not len(begin) == len(end) == len(told):
        return
    for first in permutations(begin):
        if all(a.shape == b.shape and b.color in (None, a.color) for a, b in zip(first, told)):
            for last in permutations(end):
                if all(a[:2] == b[:2] for a, b in zip(first, last)):
                    yield first, last


def motion(first, last):
    """The motion, out of MOTIONS, that is nearest to what a thing did."""
    scale = np.array((1, 1, 3.4))  # 5 pixels of radius count as 17 of travel
    change = np.subtract(last[2:5], first[2:5]) * scale
    return min(MOTIONS, key=lambda name: math.dist(change, MOTIONS[name].change * scale))


def moves_right(seen, told):
    """Does everything move as it is told?"""
    return any(
        all(item.motion in (None, motion(*ends)) for item, *ends in zip(told, first, last))
        for first, last in pairings(seen, told)
    )


def is_related(order, relation):
    """Does the relation hold between the first two things?"""
    return not relation or distances(*order[0][2:4], *order[1][2:4])[relation] > 4


def obeys(seen, sample):
    """Do frames show all that the text of a sample tells? What it leaves out is free."""
    told, full = sample.told, sample.target.objects
    grounds = {frame.background for frame in seen}
    if len(grounds) > 1 or "unclear" in grounds or told.background not in (None, *grounds):
        return False
    if any(looks(frame.things) != looks(seen[0].things) for frame in seen):
        return False

    def is_right(item, whole, first, last):
        if not is_there(first, item, trace(whole, 0)):
            return False
        moves = item.motion is None or len(seen) == 1
        return moves or (motion(first, last) == item.motion and is_there(last, item, trace(whole, 1)))

    return any(
        is_related(first, sample.relation) and all(map(is_right, told.objects, full, first, last))
        for first, last in pairings(seen, told.objects)
    )
