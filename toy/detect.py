"""What frames show, found by colour and outline, and whether that is what a text asks for. Lengths are pixels
of a 64-pixel frame, as in world.py."""

import math
from collections import namedtuple
from itertools import permutations

import numpy as np
import torch
import torch.nn.functional as F

from toy.world import BACKGROUNDS, COLORS, MOTIONS, SHAPES, distances, trace

Thing = namedtuple("Thing", "shape color x y r mask")  # seen in a frame; mask: its pixels [64, 64]
Seen = namedtuple("Seen", "background things ground")  # ground: [64, 64], True where no thing is near


def shrink(clip):
    """A clip or an image [3, T, H, W] in [-1, 1] -> its frames [T, 3, 64, 64] in [0, 255]."""
    frames = clip.float().transpose(0, 1)
    return F.interpolate((frames.clamp(-1, 1) + 1) * 127.5, (64, 64), mode="area")


def detect(clip):
    """What the frames of a clip or an image [3, T, H, W] in [-1, 1] show -> T Seens. Colours, shapes and
    backgrounds that are none of the toy world's are "unclear"."""
    names, grounds = [*BACKGROUNDS, *COLORS], len(BACKGROUNDS)
    palette = torch.tensor([*BACKGROUNDS.values(), *COLORS.values()], dtype=torch.float32)
    distance = torch.cdist(shrink(clip).flatten(2).transpose(1, 2), palette)  # [T, 64 * 64, colours]
    least, nearest = distance.min(2)
    sure = F.one_hot(nearest, len(names)).bool() & (least < 60)[..., None]
    present = sure.sum(1) >= 20  # edges mix colours: they count as one that covers an area
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
    """Number the connected components of masks [N, 1, H, W]: the largest number spreads. 0 is outside."""
    labels = torch.arange(1.0, mask[0].numel() + 1).view(mask[:1].shape) * mask
    while True:
        spread = F.max_pool2d(labels, 3, 1, 1) * mask
        if torch.equal(spread, labels):
            return labels
        labels = spread


def identify(mask, sure, names):
    """The Thing that covers a mask [64, 64]. Its colour is the one that most of it shows (`sure`:
    [64, 64, colours]); its shape is the one that overlaps it most, if drawn with the same centre and area."""
    shares = sure[mask].float().mean(0)
    color = names[shares.argmax()] if shares.max() > 0.6 else "unclear"
    (y, x), area = (mask.nonzero() + 0.5).mean(0), mask.sum()
    choices = [(0.75, "unclear", (area / math.pi).sqrt())]
    for shape in SHAPES:
        share, r = fit(mask, shape, x, y)
        if r > 6.5:  # else a small diamond could pass for a tiny circle
            choices.append((share, shape, r))
    _, shape, r = max(choices)
    return Thing(shape, color, x.item(), y.item(), r.item(), mask)


def outline(shape, x, y, r):
    """The pixels [64, 64] that a shape covers."""
    pixel = torch.arange(64) + 0.5
    return SHAPES[shape]((pixel - x).abs(), pixel[:, None] - y, r) < 0


UNIT_AREAS = {shape: outline(shape, 32, 32, 28).sum() / 28**2 for shape in SHAPES}  # at radius 1


def fit(mask, shape, x, y):
    """Draw a shape around (x, y), the centre of a mask [64, 64], with the mask's area -> their overlap
    (intersection over union), and the radius."""
    r = (mask.sum() / UNIT_AREAS[shape]).sqrt()
    ideal = outline(shape, x, y, r)
    return ((ideal & mask).sum() / (ideal | mask).sum()).item(), r


def keeps(seen, things):
    """Does every frame show the shapes of these things or objects in their colours, wherever they are?"""
    wanted = sorted(thing[:2] for thing in things)
    return all(sorted(thing[:2] for thing in frame.things) == wanted for frame in seen)


def is_there(thing, item, place):
    """Is a thing this object in all that the text states? A stated cell holds within 4 pixels of the place
    (x, y, r); a stated size within 2.5 of its radius: halfway from small to large."""
    x, y, r = place
    near = item.cell is None or math.hypot(thing.x - x, thing.y - y) < 4
    sized = item.size is None or abs(thing.r - r) < 2.5
    return near and sized and thing.shape == item.shape and item.color in (None, thing.color)


def in_place(things, objects, time):
    """Are the things of a frame the objects, each in its place at that time, whatever their sizes?"""
    places = [trace(item, time) for item in objects]
    sizeless = [item._replace(size=None) for item in objects]
    orders = permutations(things) if len(things) == len(objects) else ()
    return any(all(map(is_there, order, sizeless, places)) for order in orders)


def pairings(seen, told):
    """Yield the things of the first and of the last frame, in all orders that match the told objects by shape
    and colour."""
    begin, end = seen[0].things, seen[-1].things
    if not len(begin) == len(end) == len(told):
        return
    for first in permutations(begin):
        if all(a.shape == b.shape and b.color in (None, a.color) for a, b in zip(first, told)):
            for last in permutations(end):
                if all(a[:2] == b[:2] for a, b in zip(first, last)):
                    yield first, last


def motion(first, last):
    """The name of the motion that is nearest to what a thing did, from the first frame to the last."""
    scale = np.array((1, 1, 3.4))  # 5 pixels of radius count as 17 of travel
    change = np.subtract(last[2:5], first[2:5]) * scale
    return min(MOTIONS, key=lambda name: math.dist(change, MOTIONS[name].change * scale))


def moves_as_told(seen, told):
    """Does each thing move as the text says?"""
    return any(
        all(item.motion in (None, motion(*ends)) for item, *ends in zip(told, first, last))
        for first, last in pairings(seen, told)
    )


def is_related(order, relation):
    """Does the relation hold between the first two things?"""
    return not relation or distances(*order[0][2:4], *order[1][2:4])[relation] > 4


def obeys(seen, sample):
    """Do frames show all that the text of a sample states? What it leaves out is free."""
    told, full = sample.told, sample.target.objects
    grounds = {frame.background for frame in seen}
    fitting = len(grounds) == 1 and "unclear" not in grounds and told.background in (None, *grounds)
    if not fitting or not keeps(seen, seen[0].things):
        return False

    def is_right(item, whole, first, last):
        begins, ends = is_there(first, item, trace(whole, 0)), is_there(last, item, trace(whole, 1))
        return begins and (item.motion is None or ends and motion(first, last) == item.motion)

    return any(
        is_related(first, sample.relation) and all(map(is_right, told.objects, full, first, last))
        for first, last in pairings(seen, told.objects)
    )
