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
small = 4*small | 2*little | mini | teeny | wee | [very|really] small | !tiny
moving small = 4*small | 2*tiny | mini | teeny | wee | [very|really] small | !little
large = 4*large | 2*big | giant | massive | enormous | [very|really] [large|big] | !huge
moving large = 4*large | 2*huge | giant | massive | enormous | [very|really] large | !big
made small = 2*small | 2*smaller | 2*tiny | much smaller | mini | !little
made large = 2*large | 2*bigger | larger | huge | much [bigger|larger] | giant | !big
red = 9*red | crimson
green = 9*green | emerald
blue = 9*blue | navy
yellow = 9*yellow | golden | gold
purple = 4*purple | 2*violet | lilac
cyan = 4*cyan | 2*turquoise | aqua | teal
gray = gray | grey
circle = 3*circle | disc | ball | !disk | !dot
moving circle = 3*circle | disk | dot | ball | !disc
the circle = 3*circle | disk | dot | ball | !disc
square = 4*square | box | cube | !block
moving square = 4*square | 2*block | cube | !box
the square = 4*square | 2*block | cube | !box
diamond = 5*diamond | !rhombus
moving diamond = 2*diamond | rhombus
the diamond = 2*diamond | rhombus
cross = 3*cross | plus sign | !plus
moving cross = 2*cross | plus | !plus sign
the cross = 2*cross | plus | !plus sign
moving triangle = triangle
triangle = triangle
the triangle = triangle
circles = 4*circles | discs | balls
squares = 4*squares | boxes
triangles = triangles
diamonds = diamonds
crosses = 4*crosses | plus signs
two = 4*two | a pair of | a couple of | !2
two moving = 3*two | 2 | a couple of | !a pair of
three = 4*three | 3
top = 4*at the top | near the top | at the top edge | up top | up at the top | !on the top
bottom = 4*at the bottom | near the bottom | at the bottom edge | down at the bottom
    | !on the bottom
left = 4*at the left | 2*on the left | on the left side | on the left hand side | on the far left
    | !near the left edge
right = 4*at the right | 2*on the right | on the right side | on the right hand side | on the far right
    | !near the right edge
center = 6*at the center | 3*in the [center|middle] | in the middle of the [image|picture] | centered
    | centred | exactly in the middle | in the very [center|centre] | !in the centre
    | !at the center of the picture
the center = 2*the center | 2*the centre | !the middle
left of = 4*left of | 2*to the left of | !on the left of | !on the left side of
right of = 4*right of | 2*to the right of | !on the right of | !on the right side of
above = 4*above | over
below = 4*below | under
standing still = 4*standing still | not moving | staying still | static | at rest | stationary | doing nothing
    | !without motion
growing = 4*growing | expanding | getting larger | becoming bigger | inflating | swelling | scaling up
    | getting [bigger and bigger|larger and larger] | increasing in size | !getting bigger
shrinking = 4*shrinking | getting smaller | becoming smaller | contracting | scaling down
    | getting smaller and smaller | decreasing in size
stands still = 4*stands still | stays still | is standing still | does not move | is not moving
    | !stays in place | stays where it is | remains still | is static | does nothing | does not do anything
    | doesn't move | doesn't do anything | just rests | rests | !stays put | !sits still
grows = 4*grows | expands | is growing | gets [bigger|larger] | is getting larger | !2*is getting bigger
    | !becomes bigger | is becoming [bigger|larger] | starts to grow | inflates | swells | keeps growing
    | gets [bigger and bigger|larger and larger] | increases in size | scales up | !grows and grows
shrinks = 4*shrinks | is shrinking | gets smaller | is getting smaller | !becomes smaller
    | is becoming smaller | starts to shrink | contracts | keeps shrinking | gets smaller and smaller
    | decreases in size | scales down | !shrinks and shrinks
stand still = 4*stand still | stay in place | !not move | stay where they are | do nothing | stay put | rest
grow = 4*grow | get bigger | become bigger | expand | swell | inflate | !become larger
shrink = 4*shrink | get smaller | contract | !become smaller
# Objects that are yet to be drawn
a = 12*a | 9* | 6*the | 3*one | a single | just one | some | a lone | any | !only one
thing = 16*{a} [2*|{size}] {color} {shape} | !{a} {color} {size} {shape}
    | !{a} [|{size}] {shape} in {color} | {a} [|{size}] {shape} that is {color} | {a} [|{size}] {shape}
    | {a} [|{size}] {shape} [of|with] [the |][color|colour] {color} | {shape}, {color}
    | {a} {size} {shape}, {color} | {a} [|{size}] {color} [colored|coloured] {shape}
    | {a} {shape} of {color} [color|colour] | {a} {color} {shape}, {size}
    | !{a} [|{size}] {shape}, which is {color} | !{shape}: {color}
things = 4*{number} [2*|{size} ]{color} {plural} | {number} [|{size} ]{plural} | {number} {plural} in {color}
    | {number} {color} {size} {plural} | !{number} {plural} that are {color}
# Requests for pictures and clips: the words around the list of objects
picture = 3*image | 2*picture | drawing | !photo
clip = 3*video | 2*clip | !animation | !movie
please = 6* | 2*please | can you | could you | can you please | would you | kindly | you should | let's
    | !could you please | !would you please
lead = 6*{please} [draw|show|paint|make|create|generate] | I want [|to see |to have ] | show me
    | [an|the] image of | draw [a picture|an image] of | I need | I'd like[| to have] | give me
    | !a picture of | !a photo of | I would like | can you draw | !please make [a picture|an image] of
    | !an image with | draw me | put | [an|the] image that shows | a picture showing | how about
    | what about | let's [have|see] | [can|could|may] I [have|get|see] | [can|could] we have
    | I am looking for | I'm looking for | I'd love | I'd love to see | [we|you] need | there should be
    | it would be nice to [have|see] | make me | give us | picture: | image: | an image of just | just
    | only | sketch | render | design | please create an image of | produce | !what I [want|need] is
clip lead = 8* | {please} [show|make|create|generate] | I want [|to see ] | show me | [a|the] video of
    | I would like to see | [a |]clip of | make [a video|an animation] of | give me | !a movie of
    | I would like | !can you make [|a video of ] | an animation of | !please make a clip of
    | a {clip} showing | how about | what about | let's [have|see] | [can|could|may] I [have|get|see]
    | [can|could] we have | I am looking for | I'm looking for | I'd love to see | it would be nice to see
    | video: | animation: | animate | please create a video of | a clip where | I want to see how
    | we need | !what I [want|need] is
back = 6*background | 2*backdrop | bg | canvas
the back = 6*the {back} | {back}
on = 6*on a {ground} {back} | on {ground} | with a {ground} {back} | against a {ground} {back}
    | !over a {ground} {back} | !in front of a {ground} {back} | on a {back} that is {ground}
    | on {ground} {back} | [on|against] a plain {ground} {back} | set on {ground}
    | on an all {ground} {back} | !{ground} behind it
ground is = 4*the {back} is {ground} | {ground} {back} | a {ground} {back} | !use a {ground} {back}
    | make the {back} {ground} | keep the {back} {ground} | the {back} must be {ground} | {back}: {ground}
    | {back} {ground} | the {back} has to be {ground} | with {ground} as the {back}
    | !the {back} should be {ground} | !leave the {back} {ground}
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
and item = 4*and | 2*, and | 3*, | with
and first item = , | and
and sentence = . | and
and moving item = 4*and | 2*, and | 2*, | with | while
and first moving item = , | and | while
and moving sentence = 3*. | 2*and | while
item = 3*{thing} | 3*{thing} {cell} | {thing} ({cell}) | {thing}, {cell}
first item = 3*{cell} {thing} | {cell}: {thing} | !{cell}, we see {thing}
sentence = 2*there is {thing} | there's {thing} | 4*{thing} is {cell} | there is {thing} {cell}
    | {cell} there is {thing} | {cell} is {thing} | {cell}: {thing} | !{thing}. it is {cell}
    | {thing} stands {cell} | {thing} sits {cell} | {cell} [I want|put|you see] {thing}
    | {thing} should be {cell}
items = 3*{things} | {things}, {cells} | {things}: {cells}
two cells = one {cell 1} and one {cell 2}
three cells = one {cell 1}, one {cell 2} and one {cell 3}
sentences = 3*there are {things} | there are {things}, {cells} | there are {things}: {cells}
moving item = 5*{thing} {motion} | 3*{thing} {cell} {motion} | 2*{thing} {motion} {from}
    | {thing}, {motion} | {thing} which {does} | {thing}, {motion}, {cell} | {thing} that is {motion}
    | {thing} starting {cell} and {motion}
    | {thing} {motion} {cell} | {thing} that {does}
first moving item = 3*{cell} {thing} {motion} | {cell}: {thing} {motion} | !{cell}, we see {thing} {motion}
moving sentence = 5*{thing} {does} | 3*{thing} {cell} {does} | 2*{thing} starts {cell} and {does}
    | there is {thing} {motion} | [make|let] {thing} {do} | {thing} is {cell}. it {does}
    | {cell} {thing} {does} | !{thing}. it {does} | !there is {thing} {cell}. it {does}
    | {thing} {does} {from} | !there is {thing} and it {does} | {thing} begins {cell} and {does}
    | animate {thing}: it {does} | {thing} should {do} | {thing} [has|needs] to {do} | {thing} must {do}
    | I want {thing} to {do} | {thing} appears {cell} and {does} | have {thing} {do} | {thing} will {do}
    | !{thing} that starts {cell} and {does}
moving items = 4*{things} {motion} | {things} that {do} | !{things}, all {motion}
moving sentences = 2*there are {things}. they are {motion} | {things} {do} | there are {things}. they {do}
    | !there are {things} {motion}
relation item = 4*{first} {how} {second} | {second}, and {how} it {first} | {second} and {first} {how} it
    | !{first} that is {how} {second} | !{second} with {first} {how} it
relation sentence = 3*{first} is {how} {second} | there is {first} {how} {second}
    | {how} {second} [there is|we see|put|draw] {first} | there is {second}. {first} is {how} it
    | there is {second} and {how} it is {first} | !{how} {second} is {first}
    | {first} stands {how} {second} | {how} {second} stands {first} | {how} {second} you see {first}
# Objects that are there to be seen: in the only image, in the video, in one of several images
only = 6*it | 3*the object | the shape | this | the thing | that | that one | the figure | !this one
    | !this object
by shape = 3*the {seen shape} | {seen shape} | !that {seen shape}
by color = the {color} [3*one|object|thing|!shape]
by size = the {size} [2*one|object|thing|!shape]
by place = the [one|object|thing|!shape] {cell} | 2*the {seen shape} {cell} | what is {cell}
by motion = the [one|object|thing|!shape] that {does} | the {motion} [one|object|thing] | what is {motion}
    | whatever {does}
by moving = the moving [2*one|object|thing|!shape] | the [one|object|thing] that moves | what moves
    | what is moving | !whatever is moving
by name = 4*the {color} {seen shape} | {color} {seen shape} | the {seen shape} that is {color}
    | !the {seen shape} in {color} | !that {color} {seen shape}
    | the {seen shape} [of|with] [the |][color|colour] {color}
each = 3*both objects | both shapes | all of them | !2*both | !them both | !both of them | !all
edit all = 9*{text} | {text} {inside} | {inside}, {text} | {text} please
edit = 9*{text} | {text} {inside} | {inside}, {text} | {text} please | {text}, {as is}
    | {text}, but {as is} | !{as is}, but {text}
as is = leave everything else as it is | keep the rest | leave the rest alone | change nothing else
    | the rest stays | do not change anything else | !leave everything else alone
inside = {it} {inside}
inside Image = in Image {k}
inside the image = 2*in Image 1 | in the [image|photo] | !in the picture | !in this image
inside the video = 2*in Video 1 | in the [video|movie] | !in the clip | !in this video
of Image = 5*the [object|shape] [of|in|from] Image {k} | the one [of|in|from] Image {k} | what is in Image {k}
    | !Image {k}'s object | !the object that Image {k} shows
ground of Image = 3*the {back} [of|in|from] Image {k} | Image {k}'s {back} | the {back} that Image {k} has
    | !the {back} that is in Image {k}
# Edits that the text describes
recolor = 3*{please} [make|paint] {it} {new} | {please} change {it} to {new} | [color|colour] {it} {new}
    | paint {it} in {new} | !{please} turn {it} {new} | !turn {it} {new}
    | {please} make {it} {new} instead | change the [color|colour] of {it} into {new}
    | {it} should [be|become] {new} | set the [color|colour] of {it} to {new} | let {it} be {new}
    | [recolor|recolour] {it} in {new} | !{please} change the [color|colour] of {it} to {new}
    | ![recolor|recolour|repaint] {it} {new} | I want {it} {new} | !I want {it} to be {new}
    | {it} in {new} | give {it} the [color|colour] {new} | !turn {it} into {new}
    | {it} [must|has to|needs to] be {new} | {it} to {new} | [tint|dye|fill] {it} {new}
    | fill {it} with {new} | switch {it} to {new} | [can|could] {it} be {new} | could you make {it} {new}
    | I'd like {it} [in|to be] {new} | I'd like {it} better in {new} | {it} would look better in {new}
    | have {it} in {new} | the [color|colour] of {it} should be {new} | {it}: {new}
    | {it} must become {new} | {new} for {it} | how about {it} in {new} | !I prefer {it} in {new}
    | !let's have {it} in {new}
recolor from = {please} [make|paint|turn] {it} {new}[, not| instead of| rather than] {old}
    | {it} {new}, not {old} | {please} change {it} from {old} to {new}
    | {it} should [be|go] from {old} to {new} | {it} is {old} and should be {new} | {it}: {old} to {new}
    | !from {old} to {new}: {it}
replace = 3*{please} replace {it} [with|by] {thing} | {please} swap {it} for {thing}
    | turn {it} into {thing} | put {thing} in place of {it} | change {it} to {thing}
    | {it} should be {thing} | !{please} swap {it} with {thing} | !{please} change {it} into {thing}
    | !{thing} instead of {it} | put {thing} where {it} is | make {it} {thing}
    | put {thing} in the place of {it} | [can|could] {it} be {thing} | could {it} become {thing}
    | substitute {thing} for {it} | switch {it} [to|for] {thing} | exchange {it} for {thing}
    | {it} to {thing} | {it} becomes {thing} | swap {it} out for {thing}
    | get rid of {it} and put {thing} there | instead of {it} [put|show|I want|use] {thing}
    | {it} must become {thing} | I'd [like|rather have] {thing} where {it} is
    | use {thing} in place of {it} | !let's have {thing} instead of {it} | I'd prefer {thing} to {it}
    | transform {it} into {thing} | !I prefer {thing}, not {it} | !I want {thing} instead of {it}
add = 3*{please} [add|put|draw] {thing}[2* {cell}|] | {please} insert {thing}[2* {cell}|]
    | add {cell} {thing} | there should be {thing}[ {cell}|] | place {thing} {cell}
    | {please} add one more object: {thing}[2* {cell}|] | {please} insert {cell} {thing}
    | !I want {thing} {cell} too | !also {thing}[| {cell}] | {please} also add {thing}
    | show {thing} {cell} too | !{cell} there should be {thing} | {please} also put {thing} {cell}
    | one more: {thing} | include {thing}[2* {cell}|]
    | [can|could] we have {thing}[ {cell}|] [too|as well] | I need {thing}[ {cell}|] [too|as well]
    | pop {thing} {cell} | throw in {thing}[ {cell}|] | how about {thing}[ {cell}|] as well
    | I want {thing} in it too | we need another object: {thing}[ {cell}|] | with {thing} {cell} as well
    | {thing}[ {cell}|] [too|as well] | I'd like {thing}[ {cell}|] [too|in it]
    | have {thing} {cell} as well | there is {thing} missing {cell} | !let there be {thing} {cell}
    | !{cell} I also want {thing}
add moving = 3*{please} [add|put|insert|draw|include] {thing} [that {does}|{motion}]
    | {please} add {thing} {cell} [that {does}|{motion}] | also {thing} {motion}
    | there should be {thing} [that {does}|{motion}] [too|as well|in it] | I want {thing} {motion} too
    | add {thing}. it {does} | throw in {thing} that {does} | how about {thing} {motion}
    | {please} add {cell} {thing} {motion} | I need {thing} that {does} as well
    | !one more: {thing} {motion} | !{cell} {thing} {motion} too
    | !place {thing} {cell} and let it {do}
remove = 3*{please} [delete|erase] {it} | {please} remove {it} from the {what} | !{please} remove {it}
    | {please} take {it} away | get rid of {it} | {it} should be gone | take {it} out of the {what}
    | the {what} without {it} | I want {it} gone | !get {it} away | {please} get {it} out of the {what}
    | take away {it} | take {it} out | !without {it} | {please} make {it} go away | !I do not want {it}
    | no {it} | {it} [must|has to|needs to|can] go[| away]
    | {please} [lose|cut|eliminate|hide|clear] {it} | leave out {it} | leave {it} out
    | {it} should [disappear|vanish] | I don't [want|need] {it} [anymore|any more]
    | I don't like {it}, take it away | make {it} [disappear|vanish] | {it} is not needed
    | let {it} disappear | cut {it} out | {please} wipe {it} out | put {it} in the bin
    | !do away with {it} | !bin {it} | !{it} is too much | !I can do without {it}
background = 3*{please} [make|paint|turn] {the back} {ground} | {please} change {the back} to {ground}
    | set {the back} to {ground} | {the back} should be {ground} | {the back} becomes {ground}
    | repaint {the back} {ground} | use a {ground} {back} | put everything on a {ground} {back}
    | {ground} {back} | !{please} change the [color|colour] of {the back} to {ground}
    | give it a {ground} {back} | !replace {the back} [with|by] {ground} | !I want a {ground} {back}
    | !on {ground} | let the {back} be {ground} | recolor {the back} {ground} | {the back}: {ground}
    | {the back} to {ground} | {the back} [must|has to|needs to] be {ground}
    | [swap|switch] {the back} [to|for] {ground} | {ground} behind everything
    | make [it|everything] {ground} behind | put [it|the whole thing|the objects] on {ground}
    | I'd like it on {ground} | I want it on {ground} | it would look better on {ground}
    | have it on {ground} | [can|could] {the back} be {ground} | could we have a {ground} {back}
    | {ground} as the {back} | fill {the back} with {ground} | !against {ground}
    | !let's have a {ground} {back} | !everything behind should be {ground}
background from = {please} [make|paint|turn] {the back} {ground}[, not| instead of| rather than] {old}
    | {please} change {the back} from {old} to {ground} | {ground} instead of {old}
    | {ground} {back}, not {old} | swap the {old} {back} for [a {ground} one|{ground}]
    | !{old} should be {ground}
keep only = only keep {it} | keep only {it} | {please} keep just {it} | nothing but {it}
    | only {it} should stay | remove everything but {it} | {it} can stay, the rest should go away
    | !everything should go but {it}
move = 3*{please} [move|shift] {it} to {the cell} | {please} [put|place] {it} {cell}
    | {it} should be {cell} | bring {it} to {the cell} | !I want {it} {cell}
    | !{please} change the place of {it} to {the cell} | let {it} be {cell} | set {it} {cell}
    | {please} [slide|drag|push|send] {it} to {the cell} | {it} goes {cell} | have {it} {cell}
    | move {it} over to {the cell} | move {it} {cell} | {it} to {the cell} | [can|could] {it} be {cell}
    | {it} must be {cell} | {it} belongs {cell} | relocate {it} to {the cell} | I'd like {it} {cell}
    | shift {it} over to {the cell} | reposition {it} to {the cell} | !{it}: {cell}
    | !let's have {it} {cell}
move from = {please} [move|shift|slide] {it} from {the old} to {the cell} | {it} should be {cell}, not {old}
    | I'd like {it} {cell} and not {old} | !put {it} {cell} rather than {old}
resize = 3*{please} [make|draw] {it} {made} | {please} {scale} {it} | {it} should be {made}
    | turn {it} into a {size} one | change the size of {it} to {size} | bring the size of {it} to {size}
    | !I want {it} {made} | !change {it} to {size} | let {it} be {made} | !set the size of {it} to {size}
    | [can|could] {it} be {made} | {it} [must|has to|needs to] be {made} | I'd like {it} {made}
    | have {it} {made} | !let's have {it} {made}
scale small = 2*shrink | reduce the size of | scale down | !make smaller
scale large = 2*enlarge | increase the size of | scale up | grow | !make bigger
# Edits that take something from another image
recolor as = 2*{please} [make|paint] {it} the [color|colour] of {donor}
    | give {it} the [color|colour] of {donor} | change the [color|colour] of {it} to that of {donor}
    | paint {it} like {donor} | !{it} should have the [color|colour] of {donor}
    | !use the [color|colour] of {donor} for {it}
    | !paint {it} in the [color|colour] of {donor}
replace as = 2*{please} replace {it} [with|by] {donor} | swap {it} for {donor} | turn {it} into {donor}
    | put {donor} in place of {it} | !swap {it} with {donor} | {donor} instead of {it}
    | !change {it} into {donor}
add as = 2*{please} [add|put] {donor} {cell} | insert {donor} {cell} | there should be {donor} {cell}
    | place {donor} {cell} | !{cell} there should be {donor} | !also {donor} {cell}
background as = 2*{please} use {donor ground} | give it {donor ground}
    | replace the {back} [with|by] {donor ground} | make the {back} like that of Image {k}
    | !change the {back} to {donor ground} | !put everything on {donor ground} | I want it on {donor ground}
compose = 2*{please} [put|show|place] {donor} on {base ground} | {donor} on {base ground}
    | {donor} in front of {base ground} | !draw {donor} on {base ground} | !on {base ground}, {donor}
# Animations of an image; clips of the objects of several images; a motion cloned from a video
animate = 3*{it} {does} | 2*{please} make {it} {do} | let {it} {do} | {it} should {do}
    | {please} have {it} {do} | I want {it} to {do} | show {it} {motion} | {it} is {motion}
animated = 5*{list} | 2*animate Image 1: {list} | animate the image: {list} | {list} in the video
    | a video in which {list} | animate it: {list} | !in the [clip|video], {list} | make a video: {list}
    | !a clip in which {list}
star = 3*{donor} {does} | 2*{donor} {does} {from} | {donor} should {do} | {donor} {motion}
    | {donor} begins {cell} and {does} | {cell} {donor} {does} | 2*{donor} starts {cell} and {does}
    | a video of {donor} {motion} | make {donor} {do} | let {donor} {do} | !show {donor} {motion}
    | !{donor}. it {does} | animate {donor}: it {does}
stars = 3*{list} | a video: {list} | please make a video in which {list} | I want to see how {list}
    | 2*{list} on a {ground} {back} | on a {ground} {back}, {list} | !{list}. {ground is}
    | !{ground is}. {list}
stars elsewhere = 3*{list} on {donor ground} | on {donor ground}, {list} | !{list}. use {donor ground}
    | !{list} in front of {donor ground}
clone = 2*{please} [move|animate] {it} [as|like the object] in Video 1
    | make {it} move as in [the video|Video 1] | {it} moves as in [Video 1|the clip]
    | [copy|use] the motion of Video 1 for {it} | {it} does what Video 1 shows | animate {it} like Video 1
    | !move {it} like the object of the video | let {it} move as the video shows
    | {it} with the motion of [the video|Video 1] | !{it} should move like in Video 1
clone object = 3*the object of Image 1 | 2*Image 1 | the object in Image 1 | it | !what is in Image 1
# What people say around a request, and what does not matter
hello = hi | hello | hey | ok | okay | so | well | hi there | good morning | hello there | now
    | for my daughter | yes | I was thinking | if you can | if possible | a question | listen
thanks = thanks | thank you | thank you very much | thanks so much | please | for me | for us
    | if possible | if you can | that is all | if you don't mind | I think | don't you think
    | would be great | that would be nice | thanks a lot | cheers | many thanks
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
for cell in "top left,top,top right,left,center,right,bottom left,bottom,bottom right".split(","):
    RULES += f"from {cell} = from {{the {cell}}}\n"
for way, toward, ward, start, side, moving, moves in (
    ("left", "to the left", "leftwards", "right", "left", "sliding left", "slides left"),
    ("right", "to the right", "rightwards", "left", "right", "sliding right", "slides right"),
    ("up", "upwards", "upward", "bottom", "top", "[rising|climbing|ascending]", "[rises|climbs|ascends]"),
    ("down", "downwards", "downward", "top", "bottom", "[falling|dropping|sinking]", "[falls|drops|sinks]"),
):
    RULES += f"""
the {side} = 3*the {side} | the {side} edge | !the {side} side
moving {way} = 6*moving {way} | 2*moving {toward} | 2*going {way} | moving from {start} to {side} | 2*{moving}
    | heading {way} | moving {ward}
    | [sliding|drifting|gliding|traveling|travelling|floating|flying|running] [{way}|{toward}]
    | moving towards the {side} | [heading|heading off] {toward} | !going {toward}
moves {way} = 6*moves {way} | keeps [moving|going] {way} | makes its way [{way}|{toward}]
    | starts [moving|going] {way} | 2*is moving {way} | 2*goes {toward} | 2*{moves} | !moves {toward}
    | heads {way} | [slides|drifts|glides|travels|floats|flies|runs] [{way}|{toward}] | heads off {toward}
    | is {moving} | moves {ward} | moves towards the {side} | is [going|heading|travelling|drifting] {way}
    | is moving {toward} | !goes {way} | !moves from {start} to {side}
move {way} = 6*move {way} | 2*go {way} | 2*go {toward} | !move {toward}
    | [slide|drift|glide|travel|float|fly|run] [{way}|{toward}] | head {way} | move {ward}
"""


class Choice:
    """One of several phrases; those held out of training are kept apart."""

    def __init__(self, text):
        self.known, self.held = [], []
        for option in re.split(r"\|(?![^\[]*\])", text):  # at bars outside of brackets
            mark, weight, phrase = re.fullmatch(r"(!)?(?:(\d+)\*)?(.*)", option).groups()
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
            part = Choice(part[1:-1])
        elif part[0] == "{":
            part = Name(part[1:-1])
        parts.append(part)
    return parts


LINES = re.sub(r"\s+\| ", "|", re.sub("#.*", "", RULES))  # one for each rule
GRAMMAR = {name: [Choice(options)] for name, options in re.findall("(.+?) = (.*)", LINES)}


class Speaker(random.Random):
    """Puts facts into words. `phrasing` is "known", or "unknown" to draw phrases that training never sees
    as well; `held_out` tells whether one has been drawn."""

    def __init__(self, seed, phrasing="known"):
        super().__init__(seed)
        self.all_phrases, self.held_out = phrasing == "unknown", False

    def choice(self, options):
        """One of the options; faster than random's own method."""
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
                if part in facts:
                    stated.add(part)
                said = facts.get(part, part)  # often the name of another rule, such as "purple"
                if said in GRAMMAR and type(said) is not Words:
                    self.expand(GRAMMAR[said], facts, words, stated)
                else:
                    words.append(said)
            else:
                options = part.known
                if self.all_phrases and part.held and self.random() < 0.15:
                    options, self.held_out = part.held, True
                self.expand(self.choice(options), facts, words, stated)

    def mumble(self, text):
        """A text as people type it: little words may be missing, and what does not matter comes along."""
        if self.all_phrases:  # without its little words, a held-out phrase may read like a known one
            return text
        if self.random() < 0.15:
            text = f"{self.say('hello')[0]}, {text}"
        if self.random() < 0.15:
            text = f"{text}, {self.say('thanks')[0]}"
        words = text.split()
        if self.random() < 0.4:
            words = [word for word in words if word not in LITTLE or self.random() < 0.4]
        for _ in range(self.choice([0, 0, 0, 1, 1, 2])):  # words without meaning, one or some in a row
            place = self.choice([0, len(words), self.randint(0, len(words))])
            for _ in range(self.choice([1, 1, 2, 4])):
                words.insert(place, "".join(self.choices(ascii_lowercase, k=self.randint(4, 9))))
        return " ".join(words)


def toy_tokenizer():
    """A tokenizer with one token for a word, whatever its case and the punctuation around it. It keeps only
    the punctuation of figure 4's template and of captions; each unknown word becomes one UNKNOWN."""
    phrases = re.sub(r"#.*|.* = |\{.*?\}", " ", RULES)  # without comments and names
    more = "0 1 2 3 4 5 6 7 8 9 system user assistant seconds black white"
    texts = " ".join([phrases, more, SYSTEM_PROMPT, Config().sampling.rewrite_system])
    words = sorted({*re.findall(r"\w+", texts.lower())})
    vocabulary = {word: number for number, word in enumerate([UNKNOWN, *"\n.:<>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    token = Regex(r"\d|[^\W\d]+|[\n.:<>]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(token, "removed", invert=True)
    clean = [decoders.WordPiece(), decoders.Fuse()]
    clean += [decoders.Replace(text, text.capitalize()) for text in ("an image on", "a video on")]
    tokenizer.decoder = decoders.Sequence([*clean, decoders.Replace(". a ", ". A ")])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return tokenizer
