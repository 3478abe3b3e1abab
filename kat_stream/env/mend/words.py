"""The words that tasks are named with.

Owns the vocabulary of names. Invariant: no word is a shell command, a key word of a template's instruction or a part
of another word's spelling in the same sentence, so that a name means the same wherever it stands.
"""

from __future__ import annotations

_WORDS = """
    acorn amber anchor apple arrow aspen atlas bacon badge bagel banjo barley basil beacon beetle berry birch bishop
    bison blade blaze bloom bonnet border bottle branch bread breeze brick bridge bronze brush bubble bucket butter
    button cabin cactus camel candle canyon carbon carpet castle cedar cello chalk cherry chess cider circus citron
    clover cobalt coffee comet copper coral cotton cousin crane crater cricket crown crystal daisy dancer delta denim
    desert diamond dolphin donkey dragon drum eagle earth elbow elder ember engine falcon feather fennel ferry
    fiddle finch flame flint flute forest fossil fox galaxy garden garlic ginger glacier globe goose grape gravel guitar
    hammer harbor hazel heron hinge holly honey horizon hornet igloo indigo iris island ivory jacket jaguar jasmine
    jelly jewel jungle juniper kernel kettle kitten koala ladder lagoon lantern laurel lava lemon lentil lilac lily
    linen lizard lobster lotus magnet mango maple marble meadow melon meteor mint mirror mocha moose mosaic moss
    muffin nectar needle nickel noodle nugget nutmeg oasis ocean olive onion opal orbit orchid otter oyster paddle
    palm panda papaya parrot peach pebble pecan pepper petal piano pigeon pillow pine planet plaza plum pocket polar
    pond poppy prairie prism pumpkin puzzle quartz rabbit radish raven reef ribbon river robin rocket saddle saffron
    sage salmon sandal sapphire satin scarf shadow silver sparrow spider spruce squid stable storm sugar summit
    sunset swan temple thistle thunder tiger timber tomato topaz tower trumpet tulip tundra turtle velvet violet
    walnut walrus willow window winter zebra
"""

NAMES: tuple[str, ...] = tuple(_WORDS.split())
