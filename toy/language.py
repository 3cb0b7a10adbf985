"""What people type about the toy world: a grammar, the texts it generates, and the tokenizer that reads them.

    name = a | b     a rule: say one of these phrases; in 3*a | b the first is three times as likely
    [a|b]            a choice inside a phrase; choices do not nest
    {name}           another rule, or a fact of the sample, in words
    !a               a phrase that is held out of training

A text states the facts that it names; what it leaves out is free. Only the benchmark draws held-out phrases.
Each of their words occurs in training too, with the same meaning, in another phrase.
"""

import random
import re
from string import ascii_lowercase

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from vino import SPECIAL_TOKENS, SYSTEM_PROMPT, Config

LITTLE = {*"a an the is are there with at in on".split()}  # words that people may leave out
UNKNOWN = "[UNK]"  # the token for every word that the tokenizer does not know

RULES = """
# Facts: "circle" is for requests for images, "moving circle" for requests for clips, "the circle" for one
# that is there to be seen; "left" says where something is, "the left" where it comes from or goes to.
small = 2*small | little | !tiny
moving small = 2*small | 2*tiny | !little
large = 2*large | big | !huge
moving large = 2*large | 2*huge | !big
made small = 2*small | 2*smaller | 2*tiny | !little
made large = 2*large | 2*bigger | larger | huge | !big
purple = 2*purple | violet
cyan = 2*cyan | turquoise
gray = gray | grey
circle = 3*circle | disc | !disk | !dot
moving circle = 2*circle | disk | dot | !disc
the circle = 2*circle | disk | dot | !disc
square = 3*square | box | !block
moving square = 2*square | block | !box
the square = 2*square | block | !box
diamond = 5*diamond | !rhombus
moving diamond = 2*diamond | rhombus
the diamond = 2*diamond | rhombus
cross = 3*cross | plus sign | !plus
moving cross = 2*cross | plus | !plus sign
the cross = 2*cross | plus | !plus sign
moving triangle = triangle
triangle = triangle
the triangle = triangle
circles = 4*circles | discs
squares = 4*squares | boxes
triangles = triangles
diamonds = diamonds
crosses = 4*crosses | plus signs
two = 4*two | a pair of | !2
two moving = 2*two | 2 | !a pair of
three = 4*three | 3
top = 4*at the top | near the top | at the top edge | !on the top
bottom = 4*at the bottom | near the bottom | at the bottom edge | !on the bottom
left = 4*at the left | 2*on the left | on the left side | !near the left edge
right = 4*at the right | 2*on the right | on the right side | !near the right edge
center = 4*at the center | 2*in the [center|middle] | in the middle of the [image|picture] | !in the centre
    | !at the center of the picture
the center = 2*the center | 2*the centre | !the middle
left of = 4*left of | 2*to the left of | !on the left of | !on the left side of
right of = 4*right of | 2*to the right of | !on the right of | !on the right side of
above = 4*above | over
below = 4*below | under
standing still = 4*standing still | not moving | staying still
growing = 4*growing | expanding | getting larger | becoming bigger | !getting bigger
shrinking = 4*shrinking | getting smaller | becoming smaller
stands still = 4*stands still | stays still | is standing still | does not move | !is not moving
    | !stays in place | stays where it is | remains still
grows = 4*grows | expands | is growing | gets [bigger|larger] | !2*is getting [bigger|larger]
    | !becomes bigger | is becoming [bigger|larger] | starts to grow
shrinks = 4*shrinks | is shrinking | gets smaller | !is getting smaller | !becomes smaller
    | is becoming smaller | starts to shrink
stand still = 4*stand still | stay in place | !not move | stay where they are
grow = 4*grow | get bigger | become bigger | !become larger
shrink = 4*shrink | get smaller | !become smaller
# Objects that are yet to be drawn
a = 4*a | 3* | 2*the | one
thing = 6*{a} [2*|{size}] {color} {shape} | !{a} {color} {size} {shape} | !{a} [|{size}] {shape} in {color}
    | {a} [|{size}] {shape} that is {color} | {a} [|{size}] {shape}
    | {a} [|{size}] {shape} [of|with] [the |][color|colour] {color}
things = 4*{number} [2*|{size} ]{color} {plural} | {number} [|{size} ]{plural} | {number} {plural} in {color}
    | {number} {color} {size} {plural} | !{number} {plural} that are {color}
# Requests for pictures and clips: the words around the list of objects
picture = 3*image | 2*picture | drawing | !photo
clip = 3*video | 2*clip | !animation | !movie
please = 4* | please | !could you please
lead = 6*{please} [draw|show|paint|make|create|generate] | I want [|to see |to have ] | show me
    | [an|the] image of | draw [a picture|an image] of | I need | I'd like[| to have] | give me
    | !a picture of | !a photo of | I would like | can you draw | !please make [a picture|an image] of
    | !an image with
    | draw me | put | [an|the] image that shows | a picture showing
clip lead = 8* | {please} [show|make|create|generate] | I want [|to see ] | show me | [a|the] video of
    | I would like to see | [a |]clip of | make [a video|an animation] of | give me | !a movie of
    | I would like | !can you make [|a video of ] | an animation of | !please make a clip of
    | a {clip} showing
back = 4*background | backdrop
the back = 6*the {back} | {back}
on = 6*on a {ground} {back} | on {ground} | with a {ground} {back} | against a {ground} {back}
    | !over a {ground} {back} | !in front of a {ground} {back} | on a {back} that is {ground}
ground is = 4*the {back} is {ground} | {ground} {back} | a {ground} {back} | !use a {ground} {back}
    | make the {back} {ground} | !the {back} should be {ground}
request = 6*{lead} {list} | 3*{lead} {list} {on} | 3*{list} {on} | !{list} | !{list} | {on} {list}
    | {lead} {list}. {ground is} | {ground is}. {list} | {on}[: |, there is |, draw ]{list}
    | ![|a ]{ground} {back} with {list} | !{list}, {ground is}
request in sentences = 6*{list} | 2*{list}. {ground is} | 2*{ground is}. {list}
    | [an image|a picture] {on}. {list} | !{list}, {on} | ![in the {picture}, |{please} draw this: ]{list}
clip request = 6*{clip lead} {list} | 5*{clip lead} {list} {on} | {on} {list}
    | {clip lead} {list}. {ground is} | {ground is}. {list} | {on}[: |, there is |, show ]{list}
    | !{ground} {back} with {list} | !{list}, {ground is}
clip request in sentences = 6*{list} | 2*{list} {on} | 2*{list}. {ground is} | 2*{ground is}. {list}
    | {on} {list} | a {clip} {on}. {list} | !in the {clip}, {list}
    | !{please} make a {clip}: {list}
    | a {clip} in which {list} | !a {clip} where {list} | a {clip} that shows: {list}
quiet clip request = {quiet lead} {list} | {quiet lead} {list} {on}
quiet lead = a video of | a movie of | {please} make a clip of | {please} show [a video|an animation] of
    | !create an animation of
    | !I want a video of
# Objects as items of a list, or in sentences of their own; in clips each with its motion
and item = 4*and | 2*, and | 3*, | with | next to
and first item = , | and
and sentence = . | and
and moving item = 4*and | 2*, and | 2*, | with | while
and first moving item = , | and | while
and moving sentence = 3*. | 2*and | while
item = {thing} | {thing} {cell}
first item = 3*{cell} {thing} | {cell}: {thing} | !{cell}, we see {thing}
sentence = 2*there is {thing} | there's {thing} | 4*{thing} is {cell} | there is {thing} {cell}
    | {cell} there is {thing}
    | {cell} is {thing} | !{cell}: {thing} | !{thing}. it is {cell} | {thing} stands {cell}
items = {things}
sentences = there are {things}
moving item = 5*{thing} {motion} | 3*{thing} {cell} {motion} | 2*{thing} {motion} from {the cell}
    | !{thing} {motion} {cell} | !{thing} that {does}
first moving item = 3*{cell} {thing} {motion} | {cell}: {thing} {motion} | !{cell}, we see {thing} {motion}
moving sentence = 5*{thing} {does} | 3*{thing} {cell} {does} | 2*{thing} starts {cell} and {does}
    | there is {thing} {motion} | [make|let] {thing} {do} | {thing} is {cell}. it {does}
    | {cell} {thing} {does} | !{thing}. it {does} | !there is {thing} {cell}. it {does}
    | {thing} {does} from {the cell} | !there is {thing} and it {does} | {thing} begins {cell} and {does}
    | animate {thing}: it {does}
    | !{thing} that starts {cell} and {does}
moving items = {things} {motion} | !{things}, all {motion}
moving sentences = there are {things}. they are {motion} | !there are {things} {motion}
relation item = 4*{first} {how} {second} | {second}, and {how} it {first} | {second} and {first} {how} it
    | {how} {second} {first} | !{first} that is {how} {second} | !{second} with {first} {how} it
relation sentence = 3*{first} is {how} {second} | there is {first} {how} {second}
    | {how} {second} [there is|we see|put|draw] {first} | there is {second}. {first} is {how} it
    | there is {second} and {how} it is {first} | !{how} {second} is {first}
    | {first} stands {how} {second} | {how} {second} stands {first} | {how} {second} you see {first}
# Objects that are there to be seen: in the only image, in the video, in one of several images
only = 4*it | 2*the object | the shape | this | !this one | !this object
by shape = 3*the {seen shape} | {seen shape} | !that {seen shape}
by color = the {color} [3*one|object|!shape]
by size = the {size} [one|object|!shape]
by place = the [one|object|{seen shape}|!shape] {cell}
by name = 4*the {color} {seen shape} | {color} {seen shape} | the {seen shape} that is {color}
    | !the {seen shape} in {color} | !that {color} {seen shape}
    | the {seen shape} [of|with] [the |][color|colour] {color}
each = 3*both objects | both shapes | all of them | everything | !2*both | !them both | !both of them | !all
edit = 6*{text} | {text} {inside} | {inside}, {text} | {text} please
inside Image = in Image {k}
inside the image = 2*in Image 1 | in the [image|photo] | !in the picture | !in this image
inside the video = 2*in Video 1 | in the [video|movie] | !in the clip | !in this video
of Image = 5*the [object|shape] [of|in|from] Image {k} | the one [of|in|from] Image {k} | what is in Image {k}
    | !Image {k}'s object | !the object that Image {k} shows
ground of Image = 3*the {back} [of|in|from] Image {k} | Image {k}'s {back} | the {back} that Image {k} has
    | !the {back} that is in Image {k}
# Edits that the text describes
recolor = 3*{please} [make|paint] {it} {new} | {please} change {it} to {new} | [color|colour] {it} {new}
    | paint {it} in {new} | !{please} turn {it} {new} | !turn {it} {new} | {please} make {it} {new} instead
    | change the [color|colour] of {it} into {new} | {it} should [be|become] {new}
    | set the [color|colour] of {it} to {new} | let {it} be {new} | [recolor|recolour] {it} in {new}
    | !{please} change the [color|colour] of {it} to {new} | ![recolor|recolour|repaint] {it} {new}
    | I want {it} {new} | !I want {it} to be {new} | {it} in {new} | give {it} the [color|colour] {new}
    | !turn {it} into {new}
replace = 3*{please} replace {it} [with|by] {thing} | {please} swap {it} for {thing} | turn {it} into {thing}
    | put {thing} in place of {it} | change {it} to {thing} | {it} should be {thing}
    | !{please} swap {it} with {thing} | !{please} change {it} into {thing} | !{thing} instead of {it}
    | put {thing} where {it} is | make {it} {thing} | put {thing} in the place of {it}
    | !I want {thing} instead of {it}
add = 3*{please} [add|put|draw] {thing}[2* {cell}|] | {please} insert {thing}[2* {cell}|] | add {cell} {thing}
    | there should be {thing}[ {cell}|] | place {thing} {cell}
    | {please} add one more object: {thing}[2* {cell}|] | {please} insert {cell} {thing}
    | !I want {thing} {cell} too | !also {thing}[| {cell}] | {please} also add {thing}
    | show {thing} {cell} too | !{cell} there should be {thing} | {please} also put {thing} {cell}
    | one more: {thing}
remove = 3*{please} [delete|erase] {it} | {please} remove {it} from the {what} | !{please} remove {it}
    | {please} take {it} away | get rid of {it} | {it} should be gone
    | take {it} out of the {what} | the {what} without {it} | I want {it} gone | !get {it} away
    | {please} get {it} out of the {what} | take away {it} | take {it} out | !without {it}
    | {please} make {it} go away | !I do not want {it}
background = 3*{please} [make|paint|turn] {the back} {ground} | {please} change {the back} to {ground}
    | set {the back} to {ground} | {the back} should be {ground} | {the back} becomes {ground}
    | repaint {the back} {ground} | use a {ground} {back} | put everything on a {ground} {back}
    | {ground} {back} | !{please} change the [color|colour] of {the back} to {ground}
    | give it a {ground} {back} | !replace {the back} [with|by] {ground} | !I want a {ground} {back}
    | !on {ground} | let the {back} be {ground} | recolor {the back} {ground}
move = 3*{please} [move|shift] {it} to {the cell} | {please} [put|place] {it} {cell} | {it} should be {cell}
    | bring {it} to {the cell} | !I want {it} {cell} | !{please} change the place of {it} to {the cell}
    | let {it} be {cell} | set {it} {cell}
resize = 3*{please} [make|draw] {it} {made} | {please} {scale} {it} | {it} should be {made}
    | turn {it} into a {size} one | change the size of {it} to {size} | bring the size of {it} to {size}
    | !I want {it} {made} | !change {it} to {size} | let {it} be {made} | !set the size of {it} to {size}
scale small = shrink | reduce the size of | !make smaller
scale large = enlarge | increase the size of | !make bigger
# Edits that take something from another image
recolor as = 2*{please} [make|paint] {it} the [color|colour] of {donor}
    | give {it} the [color|colour] of {donor} | change the [color|colour] of {it} to that of {donor}
    | paint {it} like {donor} | !{it} should have the [color|colour] of {donor}
    | !use the [color|colour] of {donor} for {it}
    | make {it} the [color|colour] of Image {k} | !paint {it} in the [color|colour] of Image {k}
replace as = 2*{please} replace {it} [with|by] {donor} | swap {it} for {donor} | turn {it} into {donor}
    | put {donor} in place of {it} | !swap {it} with {donor} | {donor} instead of {it}
    | !change {it} into {donor}
add as = 2*{please} [add|put] {donor} {cell} | insert {donor} {cell} | there should be {donor} {cell}
    | place {donor} {cell} | !{cell} there should be {donor} | !also {donor} {cell}
background as = 2*{please} [use|show] {donor ground} | give it {donor ground}
    | replace the {back} [with|by] {donor ground} | make the {back} like that of Image {k}
    | !change the {back} to {donor ground} | !put everything on {donor ground} | I want {donor ground}
compose = 2*{please} [put|show|place] {donor} on {base ground} | {donor} on {base ground}
    | {donor} in front of {base ground} | !draw {donor} on {base ground} | !on {base ground}, {donor}
# Animations of an image; clips of the objects of several images; a motion cloned from a video
animate = 3*{it} {does} | 2*{please} make {it} {do} | let {it} {do} | {it} should {do}
    | !{please} have {it} {do} | I want {it} to {do} | show {it} {motion} | {it} is {motion}
animated = 5*{list} | 2*animate Image 1: {list} | animate the image: {list} | {list} in the video
    | a video in which {list} | animate it: {list} | !in the [clip|video], {list} | make a video: {list}
    | !a clip in which {list}
star = 3*{donor} {does} | {donor} begins {cell} and {does} | {donor} {cell} {does}
    | 2*{donor} starts {cell} and {does} | a video of {donor} {motion} | make {donor} {do} | let {donor} {do}
    | !show {donor} {motion} | !{donor}. it {does} | animate {donor}: it {does}
stars = 3*{list} | 2*{list} on a {ground} {back} | on a {ground} {back}, {list} | !{list}. {ground is}
    | !{ground is}. {list}
stars elsewhere = 3*{list} on {donor ground} | on {donor ground}, {list} | !{list}. use {donor ground}
    | !{list} in front of {donor ground}
clone = 2*{please} [move|animate] {it} [as|like the object] in Video 1
    | make {it} move as in [the video|Video 1] | {it} moves as in [Video 1|the clip]
    | [copy|use] the motion of Video 1 for {it} | {it} does what Video 1 shows | animate {it} like Video 1
    | !move {it} like the object of the video | let {it} move as the video shows
    | {it} with the motion of [the video|Video 1] | !{it} should move like in Video 1
clone object = 3*the object of Image 1 | 2*Image 1 | the object in Image 1 | it | !what is in Image 1
# Questions, and copies
look = 4*describe Image {k} | what is in Image {k} | what does Image {k} show
    | what do [you|we] see in Image {k} | can you say what is in Image {k} | could you describe Image {k}
    | !what can you see in Image {k} | !say what Image {k} shows
watch = 4*describe Video 1 | what is in [the video|Video 1] | what does Video 1 show
    | what happens in [the video|Video 1] | !what do you see in the video | !describe what happens in Video 1
    | !say what the clip shows
copy = 2*reconstruct Image {k} | show Image {k} | Image {k} again | copy Image {k} | !show Image {k} again
"""
for high, upper in (("top", "upper"), ("bottom", "lower")):
    for side in ("left", "right"):
        corner = f"[3*{high} {side}|{upper} {side}]"
        RULES += f"""
{high} {side} = 4*at the {corner} | 2*in the {corner} corner | in the {corner} | at {corner}
    | in the {corner} corner of the [image|picture]
    | in {corner} | !on the {corner} | !near the {corner} corner
the {high} {side} = 3*the {corner} | 2*the {corner} corner | !the {corner} of the picture
"""
for way, toward, course, moving, moves in (
    ("left", "to the left", "from right to left", "sliding left", "slides left"),
    ("right", "to the right", "from left to right", "sliding right", "slides right"),
    ("up", "upwards", "from bottom to top", "rising", "rises"),
    ("down", "downwards", "from top to bottom", "falling", "falls"),
):
    side = course.split()[-1]
    RULES += f"""
the {side} = 3*the {side} | the {side} edge | !the {side} side
moving {way} = 4*moving {way} | 2*moving {toward} | going {way} | moving {course} | {moving}
    | heading {way} | !going {toward}
moves {way} = 4*moves {way} | is moving {way} | goes {toward} | {moves} | !moves {toward} | heads {way}
    | !is moving {toward}
    | !goes {way} | !moves {course}
move {way} = 4*move {way} | go {way} | go {toward} | !move {toward}
"""


class Choice:
    """One of several phrases; those held out of training are kept apart."""

    def __init__(self, text):
        self.known, self.held = [], []
        for option in re.split(r"\|(?![^\[]*\])", text):  # at bars outside of brackets
            mark, weight, phrase = re.fullmatch(r"(!)?(?:(\d)\*)?(.*)", option).groups()
            phrases = self.held if mark else self.known
            phrases += [parse(phrase)] * int(weight or 1)


class Words(str):
    """Finished text: never looked up as a rule, even if it reads like the name of one."""


class Name(str):
    """The name of a fact or of a rule."""


def parse(text):
    """A phrase -> list of strings, Names and Choices."""
    parts = []
    for part in re.findall(r"\[.*?\]|\{.*?\}|[^\[{]+", text):
        if part[0] == "[":
            parts.append(Choice(part[1:-1]))
        elif part[0] == "{":
            parts.append(Name(part[1:-1]))
        else:
            parts.append(part)
    return parts


def read_rules(text):
    """A text like RULES -> {name: parsed phrase}."""
    text = re.sub(r"\s+\| ", "|", re.sub("#.*", "", text))
    rules = (line.split(" = ") for line in text.split("\n") if line)
    return {name: [Choice(options)] for name, options in rules}


GRAMMAR = read_rules(RULES)


class Speaker(random.Random):
    """Puts facts into words. `phrasing` is "known", or "unknown" to draw phrases that training never sees
    as well; `held_out` tells whether one has been drawn."""

    def __init__(self, seed, phrasing="known"):
        super().__init__(seed)
        self.all_phrases, self.held_out = phrasing == "unknown", False

    def choice(self, options):
        """One of the options; four times as fast as random's own method."""
        return options[int(self.random() * len(options))]

    def say(self, rule, **facts):
        """A rule of the grammar in words, and the names of the facts that these words state."""
        words, stated = [], set()
        self.expand(GRAMMAR[rule], facts, words, stated)
        return Words(" ".join("".join(words).split())), stated

    def expand(self, phrase, facts, words, stated):
        """Append a parsed phrase, in words, to `words`, and add the facts that it states to `stated`."""
        for part in phrase:
            if type(part) is str:
                words.append(part)
            elif type(part) is Name:
                rule = part
                if part in facts:
                    stated.add(str(part))
                    rule = facts[part]  # often the name of a rule itself, such as "purple"
                if type(rule) is not Words and rule in GRAMMAR:
                    self.expand(GRAMMAR[rule], facts, words, stated)
                else:
                    words.append(rule)
            else:
                options = part.known
                if self.all_phrases and part.held and self.random() < 0.15:
                    options, self.held_out = part.held, True
                self.expand(self.choice(options), facts, words, stated)

    def mumble(self, text):
        """A text as typed in a hurry: little words may be missing, and meaningless ones added."""
        words = text.split()
        if self.all_phrases:  # without its little words, a held-out phrase may read like a known one
            return text
        if self.random() < 0.5:
            words = [word for word in words if word not in LITTLE or self.random() < 0.4]
        if self.random() < 0.92:
            return " ".join(words)
        for _ in range(self.randint(1, 2)):
            word = "".join(self.choices(ascii_lowercase, k=self.randint(4, 9)))
            words.insert(self.randint(0, len(words)), word)
        return " ".join(words)


def toy_tokenizer():
    """A tokenizer with one token for a word, whatever its case and the punctuation around it. It keeps only
    the punctuation of figure 4's template and of captions; each unknown word becomes one UNKNOWN."""
    texts = [SYSTEM_PROMPT, Config().sampling.rewrite_system, " ".join(map(str, range(10)))]
    texts.append("system user assistant seconds red green blue yellow black white")
    texts.append(re.sub(r"#.*|.* = |\{.*?\}", " ", RULES))  # without comments and names
    words = {word for text in texts for word in re.findall(r"\w+", text.lower())}
    vocabulary = {word: number for number, word in enumerate([UNKNOWN, *"\n.:<>", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    token = Regex(r"\d|[^\W\d]+|[\n.:<>]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(token, "removed", invert=True)
    clean = [decoders.WordPiece(), decoders.Fuse()]
    clean += [decoders.Replace(text, text.capitalize()) for text in ("an image on", "a video on")]
    tokenizer.decoder = decoders.Sequence([*clean, decoders.Replace(". a ", ". A ")])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return tokenizer
