"""Texts of several kinds that stand for "some other document" where nobody has given samples of the real ones.

Written for this purpose; what they say is invented.
"""

__all__ = ["SAMPLE_TEXTS"]

_PASSAGES = (
    "The Aldmoor Viaduct is a railway bridge across the river Teel, opened in 1874 after six years of work. It has "
    "nineteen arches of red sandstone and is 412 metres long. The engineer was Robert Haldane (1829-1901), who had "
    "built two smaller bridges for the same company. Trains stopped running in 1966, and for twenty years the viaduct "
    "stood unused. Since 1991 it has carried a footpath, which about 80,000 people walk each year. In 2008 it was used "
    'as a location for the film "The Last Signalman", directed by Ann Forsyth.\n\n',
    "Maria Lindqvist (born 12 March 1958) is a Swedish singer, songwriter and actress. She grew up in Malmö and studied "
    "music in Copenhagen. Her first album, Northern Rooms, was released in 1981 and sold more than 200,000 copies. She "
    "has since recorded eleven albums and appeared in several television series, among them The Harbour (1994-1997). "
    "Lindqvist was married to the producer Erik Dahl from 1985 to 2002; they have two children. In 2011 she received "
    "the national prize for music.\n\n",
    "How to renew a card: sign in to your account and choose Settings, then Cards. Select the card that is about to "
    "expire and press Renew. You will be asked for the code that we send to your phone. A new card arrives within seven "
    "working days; the old one keeps working until then. If you have moved, change your address first. There is no "
    "charge for a renewal, but a lost card costs 15 euros. For questions call 0800 555 2071, Monday to Friday, between "
    "9 am and 5 pm.\n\n",
    "Results for the second quarter: revenue rose by 4.2 % to 318 million, while costs fell slightly. The largest "
    "increase was in services (+11 %); sales of equipment were flat. Net income was 27 million, compared with 22 million "
    "a year earlier. The board expects growth of between 3 and 5 % for the year and will propose a dividend of 0.40 per "
    "share. During the quarter the company opened offices in Lisbon and Toronto and had 2,140 employees at the end of "
    "June.\n\n",
    "The common reed warbler is a small brown bird of wetlands. It builds a deep cup-shaped nest between the stems of "
    "reeds, about a metre above the water, and lays three to five eggs in May or June. Both parents feed the young, "
    "mostly with insects and spiders. In autumn the birds fly south across the desert and spend the winter in tropical "
    "Africa. The population has been stable since the 1990s, but it depends on old reed beds, which are often drained or "
    "cut. Its song is a slow chatter with many repeated notes.\n\n",
    '"You never told me," said Clara. She put the letter back on the table and looked out of the window, where it had '
    'begun to snow. "I wanted to," her brother answered, "but then Father came home, and after that there was no time." '
    "Nobody spoke for a while. In the kitchen the clock struck four. At last she took her coat from the chair. \"If we "
    'leave now," she said, "we can be at the station before dark. You can explain the rest to me on the train."\n\n',
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n    return total / len(values)\n\n"
    "The function above returns the average of a list of numbers. It fails with a ZeroDivisionError if the list is "
    "empty; check for that first, or return None. To read the numbers from a file, open it, split each line at the "
    "commas and convert every field with float(). Lines that begin with # are comments and can be skipped. See the next "
    "section for how to write the result back.\n\n",
    "The Battle of Korvan was fought on 3 September 1412 between the army of Duke Leopold II and the forces of the "
    "northern league. The duke had about 6,000 men, the league perhaps 9,000. After heavy rain the league's cavalry could "
    "not cross the marsh, and its infantry was defeated before noon. The peace signed in the following spring gave the "
    "towns of Hessel and Brandau to the duke, who held them until his death in 1431. A stone cross marks the place; it "
    "was restored by the local council in 1898.\n\n",
)  # fmt: skip

# each with its neighbour: a few hundred tokens, every passage once near and once farther away
SAMPLE_TEXTS: tuple[str, ...] = tuple(a + b for a, b in zip(_PASSAGES, (*_PASSAGES[1:], _PASSAGES[0]), strict=True))
