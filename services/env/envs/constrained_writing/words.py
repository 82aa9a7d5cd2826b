"""Nouns that a model of any size knows, in lower case."""

NOUNS = tuple(
    """
actor airport animal ankle apple arm army arrow artist aunt baby bag baker ball balloon banana band bank basket bath
beach beard bed bee bell bench bicycle bird blanket boat body bone book boot bottle bowl box boy branch bread breakfast
brick bridge brother brush bucket building bus bush butter button cable cake camera camp candle car card carpet cat
cave ceiling chain chair cheese chicken child church circle city class clock cloth cloud coat coffee coin college
computer cook copper corner cottage cotton country cousin cow cream crowd cup curtain dance daughter desert desk dinner
doctor dog doll door dream dress driver drum duck dust ear egg elephant engine evening eye face family farm farmer
father feather fence field finger fire fish flag floor flower fly forest fork fox friend frog fruit game garden gate
ghost gift girl glass glove goat gold grandmother grass guest guitar hair hammer hand harbour hat head heart hill
holiday honey horse hospital hotel hour house husband ice iron island jacket jar jewel journey judge juice key king
kitchen kite knee knife ladder lady lake lamp lawyer leaf leather leg lemon letter library light lion lip lunch machine
magazine map market mayor meadow meal meat medicine metal milk mirror money monkey moon morning mother mountain mouse
mouth museum music nail neck needle neighbour nest newspaper night nose nurse ocean office oil onion orange oven owl
painter palace paper parent park party pencil pepper piano picture pillow pilot pipe plane planet plant plate pocket
poem poet police pond pony potato prince prison pupil queen rabbit radio rain ring river road robot roof room rope rose
sailor salad salt sand school sea seat secret shadow sheep ship shirt shoe shop shoulder silver singer sister sky snake
snow soap sock soldier song soup spider spoon spring stage star station stone storm story stranger street student sugar
summer sun table tailor tea teacher team tent theatre thief thread throat ticket tiger tomato tongue tooth towel tower
town toy train tree trousers truck tunnel turtle uncle valley vegetable village violin visitor voice wagon waiter wall
watch water weather wedding wheel wife wind window wine wing winter wolf woman wood wool worker writer yard
""".split()  # noqa: SIM905 - not a name a line
)
