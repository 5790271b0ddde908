"""Captions made up by a grammar, with all that makes tokenizing awkward: an oracle's food for the tokenizer of CIDEr."""

import random


SUBJECTS = """a man|two women|the boy|several people|a young girl|an old dog|three cats|a couple|Sgt. Smith|Mr. and Mrs. Jones|
St. Nick|a U.S. soldier|Dr. Who's dog|J. K. Rowling|the D.J.|a 3-year-old|twenty-one kids|O'Neil|a T-shirt seller|Jr. players""".split(
    "|"
)
VERBS = """stands|is sitting|are riding|isn't looking|don't move|rides|jumps over|'s holding|couldn't have seen|is gonna eat|cannot
find|wanna buy|they've got|who's watching|is half-asleep""".split("|")
OBJECTS = """a bench|the skateboard|an umbrella|a stop sign|pizza|some luggage|a kite|the clock tower|a 747-400|an iPhone|a b&w photo|
a black/white horse|a jack-o'-lantern|hors d'oeuvres|s'mores|a Dunkin' Donuts cup|the '90s car|a 5' 10" board|a $5.99 sandwich""".split(
    "|"
)
PLACES = """in the street|at 10:30 p.m.|on Main St.|near L.A.|in Washington D.C.|outside|by the water|at the corner of 5th Ave. and
Oak Blvd.|on No. 7|in front of a tv|at the U.N.|next to I-95|in Jan. 1990|(in the back)|[indoors]""".split("|")
ENDS = (".", "", "!", "?", " .", "...", "..", "!!", "?!", ";", ",", ".)", '."', "…", " -", ":)")
PIECES = {
    "contraction": """don't won't ain't can't she'd've y'all I'm you're they'll it's who'd o'clock ma'am 'tis 'twas 'em 'til rock'n'roll
goin' ol' cap'n c'mon let's shouldn't've Isn't DON'T dogs' boss's s'more ne'er y'know mustn't-see""",
    "abbreviation": """Mr. Mrs. Dr. St. Ave. Inc. Co. Ltd. Jr. Sr. vs. etc. e.g. i.e. a.m. P.M. U.S. U.S.A. U.K. Ph.D. No. no. Nos. fig.
Figs. Jan. Sept. Fri. ft. in. lbs. Mass. mass. Tex. Sgt. Gov. Rev. W. A. b. J.R.R. T.V. a.k.a. approx. Tues. Calif. dept.""",
    "number": """3 3.5 1,000 $5 $1,000.50 50% 1st 22nd 10:30 10:30am 5'10" 6' 1/2 1-1/2 3x4 24/7 1990s '90s 90's 2-for-1 .5 -5 +5
1990-91 9/11 12/25/2010 555-1234 (555)555-1234 1.2.3 10th-century 100-lb 4.5-inch #1 no.5 5¢ £10 €5 ½ 1½ 2nd-floor 7-Up 1, 2.""",
    "quote": """"hello" 'hello' "stop". 'STOP' “go” ‘go’ «oui» `x' ``a'' "a" 'n' it’s don’t dogs’ ’90s ’em "'a'" ""a"" „so“ 5” 6’""",
    "capitals": """STOP AT&T R&B B&W Q&A H&M USA's TVs DVD'S CAN'T IT'S McDonald's iPod's eBay LOVE-IN X-RAY A+ C++ A/C WIFI-zone""",
    "punctuation": """- -- --- – — ... .. .... … ; : , ,, ! !! ? ?! !? / // \\ | ~ ^ * ** _ __ = == + & @ # ## % < > << >> ( ) [ ] { } (a) [b]
{c} ( a ) <b> </b> <unk> word--word word-word word - word word/word and/or w/o w/ word_word *word* ~word word,word word;word word:word""",
    "web": """www.flickr.com http://t.co/abc flickr.com user@mail.com @home #selfie photo.jpg IMG_1234.jpg .com yahoo! ebay.com/x &amp;
&lt; &quot; a&amp;b #1fan user@site.co.uk http://a.b/c?d=e, www.site.org.""",
    "emoticon": ":) ;) :( :-) :D =) ;-) :P ^_^ -_- <3 :/ :o) :'( xD",
    "unicode": "café naïve piñata über garçon El Niño 日本 ° • · © ® ™ × é ½-full ☀ ❤ → 20°C µ ß",
}
PIECES = {kind: pieces.split() for kind, pieces in PIECES.items()}


def caption(rng: random.Random) -> tuple[str, list[str]]:
    """One caption, and the kinds of the awkward pieces in it."""
    words = " ".join(
        rng.choice(part).strip().replace("\n", " ")
        for part in (SUBJECTS, VERBS, OBJECTS, PLACES)
        if rng.random() < 0.9
    ).split()
    kinds = []
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        kind = rng.choice(list(PIECES))
        piece = rng.choice(PIECES[kind])
        kinds.append(kind)
        how = rng.random()
        if how < 0.1:
            piece = piece.upper()
        elif how < 0.2:
            piece = piece.capitalize()
        elif how < 0.3:
            piece = rng.choice("\"'(`[“") + piece + rng.choice("\"')].,!?;:”")
        elif how < 0.4:
            piece = piece + rng.choice(".,!?;:")
        elif how < 0.45 and words:  # glued to a word
            place = rng.randrange(len(words))
            words[place] += rng.choice(("-", "/", "'", ".", ",", "_", "")) + piece
            continue
        words.insert(rng.randrange(len(words) + 1), piece)
    text = " ".join(words)
    if rng.random() < 0.5:
        text = text[:1].upper() + text[1:]
    if rng.random() < 0.03:
        text = text.upper()
    return text + rng.choice(ENDS), kinds
