"""The toy world: coloured shapes on flat backgrounds, made on the fly. It stands in for the paper's data.

Scenes are drawn in Python from a seed, put into words (language.py), and rendered in torch. Lengths are
pixels of a 64-pixel frame; time runs from 0 (first frame) to 1 (last). What a text leaves out stays as the
references show it, or is free if they do not show it.
"""

import math
from collections import namedtuple
from dataclasses import replace
from functools import lru_cache
from itertools import chain, combinations, groupby
from zlib import crc32

import torch
from tqdm import tqdm

import train
from toy.language import Speaker, Words
from train import Batch, Source, Task, chance
from vino import Reference, patchify, resize, spread_frames, vlm_size

TASKS = train.TASKS | {  # the last two are stage 0's: the VLM describes what it sees
    "look": Task((1, 2, 3)),
    "watch": Task((0,), video=True, clip=True),
}
METHODS = {  # which method of SampleMaker makes the samples of a task
    "t2i": "request", "t2v": "request", "i2v": "animate", "ti2i": "edit", "ti2i_ref": "edit", "ti2v": "cast",
    "tv2v": "edit", "tiv2v": "edit", "motion": "clone", "reconstruction": "copy", "selection": "copy",
    "look": "look", "watch": "look",
}  # fmt: skip

# fmt: off
SHAPES = {  # signed distance from (±x, y) to the edge of a shape of radius r around (0, 0)
    "circle": lambda x, y, r: torch.hypot(x, y) - r,
    "square": lambda x, y, r: torch.maximum(x, y.abs()) - 0.9 * r,
    "triangle": lambda x, y, r: torch.maximum(y, (3 ** 0.5 * x - y) / 2) - r / 2,
    "diamond": lambda x, y, r: (x + y.abs() - r) / 2 ** 0.5,
    "cross": lambda x, y, r: torch.maximum(torch.maximum(x, y.abs()) - r, torch.minimum(x, y.abs()) - r / 3)}
COLORS = {"red": (230, 40, 40), "green": (40, 180, 60), "blue": (50, 90, 230),
          "yellow": (245, 210, 40), "purple": (150, 60, 200), "cyan": (40, 200, 220)}
BACKGROUNDS = {"black": (0, 0, 0), "white": (255, 255, 255), "gray": (128, 128, 128)}
SIZES = {"small": 7.5, "large": 12.5}  # radii
CELLS = {"top left": (15, 15), "top": (32, 15), "top right": (49, 15),
         "left": (15, 32), "center": (32, 32), "right": (49, 32),
         "bottom left": (15, 49), "bottom": (32, 49), "bottom right": (49, 49)}
JITTER = 1  # from a cell's centre to its object's, at most; 1.5 pixels remain to the frame's edge
GAP = 1.5  # between two objects, at least
Motion = namedtuple("Motion", "does do change")  # change: d(x, y, r)
MOTIONS = {"standing still": Motion("stands still", "stand still", (0, 0, 0)),
           "moving left": Motion("moves left", "move left", (-17, 0, 0)),
           "moving right": Motion("moves right", "move right", (17, 0, 0)),
           "moving up": Motion("moves up", "move up", (0, -17, 0)),
           "moving down": Motion("moves down", "move down", (0, 17, 0)),
           "growing": Motion("grows", "grow", (0, 0, 5)),
           "shrinking": Motion("shrinks", "shrink", (0, 0, -5))}
GROWTH = {"growing": "small", "shrinking": "large"}  # the size to begin with, so that there is room
STARTS = {name: [cell for cell, (x, y) in CELLS.items() if 15 <= x + dx <= 49 and 15 <= y + dy <= 49]
          for name, (_, _, (dx, dy, _)) in MOTIONS.items()}  # cells to begin in, so that there is room
EDITS = (("recolor", "replace", "add", "background", "remove", "move", "resize"),  # described by the text
         ("recolor", "replace", "add", "background", "compose"))  # shown by another image
STILL_EDITS = ("move", "resize", "compose")  # only of images
STYLES = ("item", "item", "sentence", "sentence", "first item")  # rules of language.py that list objects
HELD_OUT_LAYOUTS = {frozenset(pair) for pair in [  # pairs of cells that training never fills
    ("top left", "right"), ("top right", "bottom"), ("bottom right", "left"), ("bottom left", "top")]}
# fmt: on
# size, cell, jitter: in the first frame
Object = namedtuple("Object", "shape color size cell motion jitter", defaults=["standing still", (0, 0)])
Scene = namedtuple("Scene", "background objects")  # of a clip, or of an image, which is its first frame
# kind: of edit or request; images, video, target: Scenes; told: what short_prompt states of the target, a
# Scene with None for what is free; relation: of the first object to the second, if short_prompt states it
Sample = namedtuple("Sample", "kind prompt short_prompt images video target told relation", defaults=[""])


def trace(item, time):
    """Centre and radius (x, y, r) of an object at a time from 0 to 1."""
    (x, y), (dx, dy, dr) = CELLS[item.cell], MOTIONS[item.motion].change
    return x + item.jitter[0] + time * dx, y + item.jitter[1] + time * dy, SIZES[item.size] + time * dr


def reading_order(item):
    """A key to sort objects by: row by row, from left to right."""
    return [*CELLS].index(item.cell)


def describe(scene, clip, ordered=False):
    """The caption of a scene, always in the same words: what the VLM answers. Objects come in reading order,
    or, if `ordered`, in the scene's own, which is that of a text."""
    objects = scene.objects if ordered else sorted(scene.objects, key=reading_order)
    sentences = [f"{'A video' if clip else 'An image'} on a {scene.background} background."]
    for item in objects:
        place = f"starts at the {item.cell} and is {item.motion}" if clip else f"is at the {item.cell}"
        sentences.append(f"A {item.size} {item.color} {item.shape} {place}.")
    return " ".join(sentences)


def is_clear(objects):
    """True if no two objects ever come near each other."""
    for a, b in combinations(objects, 2):
        times = (0,) if a.motion == b.motion == "standing still" else (0, 0.25, 0.5, 0.75, 1)
        for time in times:
            (x, y, r), (u, v, q) = trace(a, time), trace(b, time)
            # The gap is between their bounding boxes, or between circles large enough to hold a square.
            if max(abs(x - u), abs(y - v)) < r + q + GAP and math.hypot(x - u, y - v) < 1.28 * (r + q) + GAP:
                return False
    return True


def distances(x, y, u, v):
    """How far (x, y) lies in each direction from (u, v)."""
    return {"left of": u - x, "right of": x - u, "above": v - y, "below": y - v}


def relations(first, second):
    """Where the first object clearly is, seen from the second: a list of names, in the first frame."""
    apart = distances(*trace(first, 0)[:2], *trace(second, 0)[:2])
    return [words for words, distance in apart.items() if distance > max(8, 0.7 * max(apart.values()))]


OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def join(parts, mark):
    """Parts as one text, with a mark, such as "and" or ".", before the last one."""
    between = ". " if mark == "." else ", "
    text = between.join(parts[:-1]) + f" {mark} {parts[-1]}" if parts[1:] else parts[0]
    return Words(text.replace(" .", ".").replace(" ,", ","))


def facts(item):
    """What a phrase can say about an object, under the names that language.py uses."""
    motion = MOTIONS[item.motion]
    more = {"seen shape": f"the {item.shape}", "the cell": f"the {item.cell}"}
    more["from"] = f"from {item.cell}" if item.motion.startswith("moving") else item.cell
    return item._asdict() | more | {"does": motion.does, "do": motion.do}


def told_of(item, stated):
    """The object with None for what a phrase has not stated."""
    ways = {"size": {"size"}, "color": {"color"},
            "cell": {"cell", "the cell", "cells", "from"}, "motion": {"motion", "does", "do"}}  # fmt: skip
    free = {field: None for field, names in ways.items() if not stated & names}
    return item._replace(jitter=None, **free)


class SampleMaker(Speaker):
    """Draws scenes from a seed and puts them into words. The method of a task (METHODS) takes the number of
    reference images and whether the target is a clip, and returns a Sample."""

    def object(self, motion="standing still"):
        """Any object that has room for its motion."""
        size = GROWTH.get(motion) or self.choice([*SIZES])
        jitter = (self.uniform(-JITTER, JITTER), self.uniform(-JITTER, JITTER))
        cell = self.choice(STARTS[motion])
        return Object(self.choice([*SHAPES]), self.choice([*COLORS]), size, cell, motion, jitter)

    def is_fine(self, objects):
        """Do the objects keep apart, in a layout that is not held out?"""
        pairs = () if self.all_phrases else combinations([item.cell for item in objects], 2)
        return is_clear(objects) and HELD_OUT_LAYOUTS.isdisjoint(map(frozenset, pairs))

    def scene(self, count, clip=False, alike=1):
        """A Scene of `count` objects that keep apart. The first `alike` of them differ only in where they
        are; any two others differ in shape or colour."""
        motions, objects, tries = [*MOTIONS] if clip else ["standing still"], [], 0
        while len(objects) < count:
            tries += 1
            if tries % 12 == 0:  # start again: there may be no room left
                objects = []
            if objects and len(objects) < alike:
                item = self.object(objects[0].motion)
                item = Object(*objects[0][:3], *item[3:])
            else:
                item = self.object(self.choice(motions))
                if any(item[:2] == other[:2] for other in objects):
                    continue
            if self.is_fine([*objects, item]):
                objects.append(item)
        objects[:alike] = sorted(objects[:alike], key=reading_order)
        return Scene(self.choice([*BACKGROUNDS]), objects)

    def request(self, images, clip):
        """Text -> image or video. The text states some of the scene, and the rest is free."""
        most = 2 if clip else 3
        kind = self.choice(["", "", "", "", "counting"] if clip else ["", "", "", "counting", "position"])
        count = {"": self.randint(1, most), "counting": self.randint(2, most), "position": 2}[kind]
        scene = self.scene(count, clip, alike=count if kind == "counting" else 1)
        if kind == "counting" and count == 3 and self.random() < 0.3:
            kind, scene = "mixed", self.scene(count, clip, alike=2)
            if self.random() < 0.5:  # the odd one comes first
                scene = scene._replace(objects=scene.objects[2:] + scene.objects[:2])
        text, told, relation = self.phrase(scene, clip, kind)
        long = describe(scene, clip, ordered=True)
        if self.random() < 0.05 and not self.all_phrases:
            text, told, relation = long, scene, ""
        return Sample(kind, long, self.mumble(text), [], None, scene, told, relation)

    def phrase(self, scene, clip, kind):
        """A request for a scene as people type it -> text, the Scene and the relation that it states. Puts
        the scene's objects into the order of the text."""
        quiet, relation = clip and self.random() < 0.06, ""  # quiet: says nothing of motions
        style = self.choice(["item", "sentence"] if kind else STYLES)
        style = "item" if quiet else style
        if kind == "position":
            relation = self.choice(relations(*scene.objects))
            (first, stated), (second, more) = (self.say("thing", **facts(item)) for item in scene.objects)
            # Marks, as the two phrases may be alike.
            order, _ = self.say(f"relation {style}", how=relation, first=Words("{0}"), second=Words("{1}"))
            text = Words(order.format(first, second))
            told = [told_of(*pair) for pair in zip(scene.objects, (stated, more))]
            if order.index("{1}") < order.index("{0}"):
                relation = OPPOSITE[relation]
                scene.objects.reverse()
                told.reverse()
        else:
            text, told = self.list_objects(scene.objects, clip and not quiet, style)
        rule = "request" if style == "item" else "request in sentences"
        rule = "quiet clip request" if quiet else f"clip {rule}" if clip else rule
        text, stated = self.say(rule, list=text, ground=scene.background)
        ground = scene.background if "ground" in stated else None
        return text + self.choice(["", "."]), Scene(ground, told), relation

    def list_objects(self, objects, moving, style):
        """Objects as items of a list or as sentences -> the text, and what it states of each. Neighbours that
        look alike are counted: "two red circles"."""
        rule, phrases, told = style, [], []
        if moving:
            rule = style.replace("item", "moving item").replace("sentence", "moving sentence")
        for group in (list(group) for _, group in groupby(objects, lambda item: item[:3])):
            words = facts(group[0])
            shape = words["shape"]
            if moving:
                words |= {"shape": f"moving {shape}", "size": f"moving {words['size']}"}
            if len(group) > 1:
                words["number"] = "three" if len(group) == 3 else "two moving" if moving else "two"
                words["plural"] = f"{shape}es" if shape == "cross" else f"{shape}s"
                words["cells"] = "three cells" if len(group) == 3 else "two cells"
                words |= {f"cell {number}": item.cell for number, item in enumerate(group, 1)}
            text, stated = self.say(f"{rule}s" if len(group) > 1 else rule, **words)
            phrases.append(text)
            told += [told_of(item, stated) for item in group]
        return join(phrases, self.say(f"and {rule}")[0]), told

    def animate(self, images, clip):
        """Image 1 as the first frame -> video. What the text does not name stands still."""
        moving = []
        while not moving:
            scene = self.scene(self.randint(1, 2), clip=True)
            moving = [item for item in scene.objects if item.motion != "standing still"]
        if len({item.shape for item in scene.objects}) == len(scene.objects) and self.random() < 0.4:
            text, _ = self.list_objects(scene.objects, True, self.choice(STYLES))
            text, _ = self.say("animated", list=text)
        else:
            named = moving if self.random() < 0.7 else scene.objects
            parts = [self.say("animate", it=self.refer(item, scene), **facts(item))[0] for item in named]
            text = join(parts, "and")
        return Sample("", describe(scene, clip), self.mumble(text), [scene], None, scene, scene)

    def refer(self, item, scene, by=None):
        """Words that fit one object of a scene alone; `by` "place" or "motion": these may name it, too."""
        others = [other for other in scene.objects if other is not item]
        names = ["by name"] if others else ["by name", "only", "only"]
        if all(other.shape != item.shape for other in others):
            names += ["by shape", "by shape"]
        if all(other.color != item.color for other in others):
            names.append("by color")
        resized = by == "motion" and any(other.motion in GROWTH for other in scene.objects)
        if others and not resized and all(other.size != item.size for other in others):
            names.append("by size")
        alone = all(item.cell not in other.cell.split() for other in others)
        if by == "place" and alone or by == "motion" and all(other.motion != item.motion for other in others):
            names.append(f"by {by}")
        moving = [other for other in scene.objects if other.motion != "standing still"]
        if by == "motion" and moving == [item] and item.motion.startswith("moving"):
            names.append("by moving")
        return self.say(self.choice(names), **facts(item))[0]

    def edit(self, images, clip):
        """The video or the last image, changed as the text describes or as another image shows. What the text
        leaves out stays as it is; of an added object, it is free."""
        donors = images if clip else images - 1
        kind = self.choice([kind for kind in EDITS[donors > 0] if not clip or kind not in STILL_EDITS])
        most = (2 if clip else 3) - (kind == "add")
        while True:
            self.held_out = False
            moving = clip and kind == "add" and not donors and self.random() < 0.5
            shown = [self.scene(1, moving) for _ in range(donors or 1)]
            scene = self.scene(self.randint(1, most), clip)
            sample = self.change(kind, scene, shown, donors > 0, clip)
            if sample:
                return sample

    def change(self, kind, scene, shown, by_donor, clip):
        """A Sample that edits a scene, or None if the edit would change nothing, be ambiguous, or lead to a
        target that may not be drawn. What is new comes from one of the Scenes `shown`: `by_donor`, the text
        points at that image, else it says it in words."""
        number = self.randrange(len(shown))
        (ground, [new]), (here, objects) = shown[number], scene
        it = self.choice(objects)
        both = len(objects) == 2 and kind in ("recolor", "remove", "resize") and self.random() < 0.2
        changed = objects if both else [it]
        others = [item for item in objects if item not in changed]
        cells = [cell for cell in STARTS[new.motion] if cell != it.cell]
        if kind == "move":  # to an edge only straight: else "to the left" could mean the corner
            lines = ({"top", "center", "bottom"}, {"left", "center", "right"})
            straight = {"center"}.union(*[line for line in lines if it.cell in line])
            cells = [cell for cell in cells if " " in cell or cell in straight]
        cell = self.choice(cells)
        added = new if new.cell == cell else new._replace(cell=cell, jitter=(0, 0))
        words = facts(added) | {
            "new": new.color, "ground": ground, "made": f"made {new.size}", "scale": f"scale {new.size}",
            "what": "clip" if clip else "picture", "k": str(number + 1), "last": str(len(shown) + 1),
            "donor": "of Image", "donor ground": "ground of Image", "the old": f"the {it.cell}",
            "old": {"background": here, "move": it.cell}.get(kind, it.color),
        }  # fmt: skip
        text, stated = self.phrase_edit(kind, scene, changed, words, by_donor, clip)
        color = new.color if by_donor or "color" in stated else it.color
        size = new.size if "size" in stated else it.size
        left = {
            "recolor": others + [item._replace(color=new.color) for item in changed],
            "replace": [*others, it._replace(shape=new.shape, color=color, size=size)],
            "add": [*objects, added],
            "remove": others,
            "background": objects,
            "move": [*others, it._replace(cell=cell, jitter=(0, 0))],
            "resize": others + [item._replace(size=new.size) for item in changed],
            "compose": [new],
        }
        told = target = Scene(ground if kind == "background" else here, left[kind])
        if kind == "add" and not by_donor:
            told = Scene(here, [*objects, told_of(added, stated | {"motion"})])
            if "color" not in stated and any(item.shape == new.shape for item in objects):
                return None  # the text could mean the one that is there
        different = describe(target, clip) != describe(scene, clip)
        fitting = all(GROWTH.get(item.motion, item.size) == item.size for item in target.objects)
        if not (different and fitting and self.is_fine(target.objects)):
            return None
        if by_donor and kind == "replace" and new.size != it.size:
            return None  # whose size?
        if not both and len({item[:2] for item in target.objects}) < len(target.objects):
            return None
        images = shown if by_donor else []
        images, video = (images, scene) if clip else ([*images, scene], None)
        return Sample(kind, describe(target, clip), self.mumble(text), images, video, target, told)

    def phrase_edit(self, kind, scene, changed, words, by_donor, clip):
        """The text of an edit of one or two objects of a scene, and the names of the facts that it states.
        `words` are what it can say, under the names that language.py uses."""
        rule, named, both = kind, changed[0], len(changed) == 2
        if by_donor:
            rule = kind if kind == "compose" else f"{kind} as"
        elif kind == "add" and words["motion"] != "standing still":
            rule = "add moving"
        elif kind in ("recolor", "background", "move") and not both and self.random() < 0.12:
            rule = f"{kind} from"
        elif kind == "remove" and not both and len(scene.objects) == 2 and self.random() < 0.15:
            rule, [named] = "keep only", [item for item in scene.objects if item != named]
        where = "inside the video" if clip else "inside Image" if by_donor else "inside the image"
        inside = {"inside": where, "k": words["last"]}
        if kind == "compose":
            words["base ground"] = self.say("ground of Image", **inside)[0]
        elif kind not in ("add", "background"):  # their texts name no object of the scene
            by = "motion" if clip else "place"  # in clips, objects leave their places
            words["it"] = self.say("each")[0] if both else self.refer(named, scene, by)
            if not both and self.random() < 0.1:
                words["it"] = self.say("inside", it=words["it"], **inside)[0]
        text, stated = self.say(rule, **words)
        if kind != "compose":
            text, _ = self.say("edit all" if both or rule == "keep only" else "edit", text=text, **inside)
        return text, stated

    def cast(self, images, clip):
        """Images of one object each -> video of one or two of these objects, which begin where the text says,
        or else where their images show them."""
        order = self.sample(range(images), images)
        while True:
            self.held_out = False
            ground, objects = self.scene(self.randint(max(1, images - 1), min(images, 2)), clip)
            shown = [self.scene(1) for _ in range(images)]
            parts = []
            for place, number in enumerate(order[: len(objects)]):
                item, k = objects[place], {"k": str(number + 1)}
                text, stated = self.say("star", donor=self.say("of Image", **k)[0], **facts(item))
                parts.append(text)
                seen = item._replace(motion="standing still")
                if "cell" in stated:
                    objects[place] = item._replace(jitter=(0, 0))
                    cell = self.choice([cell for cell in CELLS if cell != item.cell])
                    seen = seen._replace(cell=cell, jitter=self.object().jitter)
                shown[number] = shown[number]._replace(objects=[seen])
            if self.is_fine(objects):
                break
        text = ". ".join(parts) if any("." in part for part in parts) else join(parts, "and")
        if images > len(objects):
            ground = shown[order[-1]].background
            source = self.say("ground of Image", k=str(order[-1] + 1))[0]
            text, _ = self.say("stars elsewhere", list=text, **{"donor ground": source})
        else:
            text, stated = self.say("stars", list=text, ground=ground)
            if "ground" not in stated:
                ground = shown[0].background
                shown = [scene._replace(background=ground) for scene in shown]
        target = Scene(ground, objects)
        return Sample("", describe(target, clip), self.mumble(text), shown, None, target, target)

    def clone(self, images, clip):
        """The object of an image moves as another one does in a video."""
        motion = self.choice([*MOTIONS][1:])
        scene, video = (Scene(self.choice([*BACKGROUNDS]), [self.object(motion)]) for _ in range(2))
        name = "clone object" if self.random() < 0.7 else self.choice(["by name", "by shape"])
        text, _ = self.say("clone", it=self.say(name, **facts(scene.objects[0]))[0])
        return Sample("", describe(scene, clip), self.mumble(text), [scene], video, scene, scene)

    def look(self, images, clip):
        """One of the images, or the video, to be described."""
        shown = [self.scene(self.randint(0, 2 if clip else 3), clip) for _ in range(images or 1)]
        number = self.randrange(len(shown))
        text, _ = self.say("watch" if clip else "look", k=str(number + 1))
        target = shown[number]
        return Sample("", text, text, [] if clip else shown, target if clip else None, target, target)

    def copy(self, images, clip):
        """One of the images, to be made again."""
        shown = [self.scene(self.randint(1, 3)) for _ in range(images)]
        number = self.randrange(images)
        text, _ = self.say("copy", k=str(number + 1))
        return Sample("", text, text, shown, None, shown[number], shown[number])


def make_sample(seed, task, images, phrasing="known"):
    """A task's Sample with `images` reference images; the same seed gives the same one. Training draws
    "known" phrasings; every text of an "unknown" phrasing has a phrase that training never draws."""
    maker = SampleMaker(seed, phrasing)
    while True:
        sample = getattr(maker, METHODS[task])(images, TASKS[task].clip)
        if maker.held_out or not maker.all_phrases:
            return sample


class ToyWorld(Source):
    """A source of samples that needs no files and has no end. Given a Vino, it draws from only `encode_once`
    samples of each layout, if the stage sets that, and keeps their encodings; each process has its own."""

    def __init__(self, stage, config, seed, vino=None):
        super().__init__(stage, config, seed)
        self.vino, self.count = vino, stage.encode_once if vino else 0
        self.encoded = {}

    def draw(self, task, position, index):
        """Sample `index` of a task: a Sample, or (number of images, number among the encoded samples). How
        many images it has depends only on `position`, where the step begins, so that all samples of a step
        have one layout."""
        images = self.images(task, position)
        if index >= 0 and self.count:
            return images, crc32(f"{self.seed} {index}".encode()) % self.count  # quick, and looks random
        return make_sample(f"{self.seed} {task} {index}", task, images)

    @lru_cache(maxsize=32)
    def images(self, task, position):
        """How many images each sample of a step has."""
        most = self.images_that_fit(TASKS[task].video)
        fitting = [number for number in TASKS[task].images if number <= most]
        return chance(self.seed, task, "images", position).choice(fitting)

    def collate(self, task, samples, device):
        """A list of what `draw` returns -> Batch."""
        if isinstance(samples[0], Sample):
            return self.render(task, samples, device)
        layout, numbers = (task, samples[0][0]), [number for _, number in samples]
        if layout not in self.encoded:
            self.encoded[layout] = self.encode(*layout, device)
        kept, rows = self.encoded[layout], torch.tensor(numbers, device=device)
        prompts, short_prompts = ([texts[n] for n in numbers] for texts in (kept.prompts, kept.short_prompts))
        references = []
        for whole in kept.references:
            features = [x[rows] for x in whole.features]
            references.append(replace(whole, latents=whole.latents[rows], features=features))
        return Batch(task, prompts, short_prompts, references, None, latents=kept.latents[rows])

    @torch.no_grad()
    def encode(self, task, images, device):
        """All samples of a layout, encoded, as one Batch."""
        prompts, short_prompts, latents, references = [], [], [], []
        # One size for all batches: each new one would cost cuDNN some planning.
        size = min(self.stage.batch, self.count)
        firsts = range(0, self.count, size)
        for first in tqdm(firsts, f"encoding {task}", leave=False, disable=train.RANK > 0):
            seeds = [f"{self.seed} {task} {train.RANK} {first + k}" for k in range(size)]
            batch = self.render(task, [make_sample(seed, task, images) for seed in seeds], device)
            prompts += batch.prompts
            short_prompts += batch.short_prompts
            latents.append(self.vino.vae.encode(batch.target))
            references.append([self.vino.encode(reference) for reference in batch.references])
        whole = []
        for parts in zip(*references):
            features = [torch.cat(layer) for layer in zip(*[part.features for part in parts])]
            whole.append(replace(parts[0], latents=torch.cat([p.latents for p in parts]), features=features))
        return Batch(task, prompts, short_prompts, whole, None, latents=torch.cat(latents))

    def render(self, task, samples, device):
        """Samples -> Batch of their pixels, drawn on the device."""
        images, video, clip = len(samples[0].images), TASKS[task].video, TASKS[task].clip
        frames = self.frames_that_fit(images, video)
        size = max(16, round(math.sqrt(self.stage.area) / 16) * 16)
        shown = [render(scenes, 1, size, device) for scenes in zip(*[s.images for s in samples])]
        if video:
            shown.append(render([s.video for s in samples], frames, size, device))
        references = [reference_of(pixels, self.config.vision) for pixels in shown]
        target = render([s.target for s in samples], frames if clip else 1, size, device)
        prompts, short_prompts = [s.prompt for s in samples], [s.short_prompt for s in samples]
        answers = [describe(s.target, clip, ordered=not s.images and not s.video) for s in samples]
        return Batch(task, prompts, short_prompts, references, target, answers)


def render(scenes, frames, size, device):
    """B scenes -> pixels [B, 3, T, H, W] in [-1, 1]. Objects do not overlap, so what each changes adds up."""
    # The copies do not block: else they would wait for all the work that the device still has to do.
    ground = torch.tensor([BACKGROUNDS[scene.background] for scene in scenes], dtype=torch.float32)
    ground = ground.to(device, non_blocking=True)[..., None, None, None]  # [B, 3, 1, 1, 1]
    canvas = ground.repeat(1, 1, frames, size, size)
    time = torch.linspace(0, 1, frames, device=device)[:, None, None]
    pixel = torch.arange(size, device=device) + 0.5
    rows = {shape: [] for shape in SHAPES}
    for b, scene in enumerate(scenes):
        for item in scene.objects:
            rows[item.shape].append([b, *COLORS[item.color], *trace(item, 0), *trace(item, 1)])
    table = torch.tensor([*chain(*rows.values())], dtype=torch.float32).to(device, non_blocking=True)
    index, color, start, end = table.view(-1, 10, 1, 1, 1).split([1, 3, 3, 3], dim=1)
    places = (torch.lerp(start, end, time) * size / 64).split([*map(len, rows.values())])
    index, coverage = index.flatten().long(), []
    for edge, place in zip(SHAPES.values(), places):
        x, y, r = place.unbind(1)  # each [N, T, 1, 1]
        coverage.append((0.5 - edge((pixel - x).abs(), pixel[:, None] - y, r)).clamp(0, 1))
    canvas.index_add_(0, index, torch.cat(coverage)[:, None] * (color - ground[index]))
    return canvas / 127.5 - 1


def reference_of(pixels, config):
    """Pixels [B, 3, T, H, W], already on the device -> Reference: a video, or with T = 1 an image."""
    seen, rules = pixels, config.image_resize
    if pixels.shape[2] > 1:
        seen, rules = pixels[:, :, spread_frames(pixels.shape[2], config.video_frames)], config.video_resize
    size = vlm_size(*vlm_size(*pixels.shape[3:], *rules[0]), *rules[1], frames=seen.shape[2])
    seen = resize(seen.transpose(1, 2).flatten(0, 1), size).unflatten(0, (len(pixels), -1)).transpose(1, 2)
    patches, grid = patchify(seen, config)
    return Reference(pixels, patches, grid, is_video=pixels.shape[2] > 1)
