"""Common English words and names, of which tasks make keys."""

ADJECTIVES = tuple(
    """
    able alert amber ample ancient angry arctic autumn awake azure bare basic bitter blank blunt
    bold brave brief bright brisk broad bronze brown busy calm careful central cheap cheerful
    chilly civil clean clear clever close cloudy coastal cold common cool copper coral cosy crisp
    curious curly daily damp daring dark deep dense distant double dry dusty eager early eastern
    easy elder empty equal exact faint fair famous fancy fast final fine firm flat fluent fond
    formal frank free fresh friendly frosty full gentle giant glad golden grand grateful green
    grey handy happy hasty heavy hidden high hollow honest hot huge humble hungry icy ideal inner
    jolly keen kind large late lazy lean light little lively local lonely long loose loud loyal
    lucky major mellow merry mild minor modern modest narrow native neat new noble northern novel
    odd old open orange outer pale patient perfect plain polite proud purple quick quiet rapid
    rare raw ready red rich ripe robust rough round royal rural rusty salty secret sharp shiny
    short shy silent silver simple slim slow small smooth snowy soft solar solid southern spare
    spicy steady steep stern still strange strict strong sturdy subtle sudden sunny sweet swift
    tall tame tender thick thin tidy tiny tough upper urban vague vast vivid warm wary western
    white whole wide wild windy wise wooden young zealous
    """.split()
)

NOUNS = tuple(
    """
    acorn actor anchor angle ankle apple apron arch arrow atlas badge baker banjo barn barrel
    basin basket beach beacon bead bean bear beard bell bench berry bike bird blanket boat bone
    book boot bottle bowl box branch bread brick bridge broom brush bucket button cabin cable
    cactus cake camel camera candle canoe canvas carpet carrot castle cat cave cellar chain chair
    chalk cheese cherry chess chimney circle clock cloud clover coat coin comb compass cook cork
    corner cotton couch cow crane crayon creek cricket crown cup curtain daisy deer desk diary
    dish doctor dog dolphin donkey door dragon drawer dream drum duck eagle ear easel elbow engine
    envelope falcon farmer feather fence ferry fiddle field finger flag flame flute forest fork
    fox frame frog garden gate ginger glacier glass glove goat goose grape guitar hammer harbor
    harp hat hawk hedge helmet heron hill hinge horn horse hotel island jacket jar jewel judge
    jungle kettle key kite kitten knee knife ladder lake lamp lantern lawn leaf lemon letter
    lettuce lily lion lizard lock magnet map maple marble market meadow melon mirror mitten moon
    mountain mouse mug needle nest nurse oak oar oasis ocean onion orchard otter oven owl ox page
    paint palace paper parrot pasture peach pear pencil pepper piano pillow pilot pine planet
    plate pocket poem pond pony potato prism pumpkin puppet puzzle quarry quilt rabbit radio
    raft rail rainbow raven ribbon river robin rocket roof rope rose ruler saddle sail salmon
    scarf school shadow sheep shelf ship shoe shovel singer skirt sled snail sofa spark sparrow
    spider spoon spring squirrel stable star statue stone stove street sugar summer swan table
    teapot temple tent thimble thread throne tiger timber toast tomato tower train tree trumpet
    tulip tunnel turtle umbrella valley vase village violin wagon wallet walnut well whale wheat
    wheel whistle willow window winter wolf wool yard zebra
    """.split()
)

FIRST_NAMES = tuple(
    """
    Aaron Ada Adam Alan Albert Alice Amanda Amy Andrew Angela Anna Anthony Arthur Barbara Beatrice
    Benjamin Bernard Beth Brian Bruce Carl Carol Caroline Catherine Charles Christine Claire
    Clara Daniel David Deborah Dennis Diana Donald Dora Dorothy Douglas Edith Edward Eleanor
    Elizabeth Ella Emily Emma Eric Ernest Esther Eva Evelyn Florence Frances Frank Frederick
    George Gerald Gloria Grace Gregory Hannah Harold Harriet Harry Helen Henry Herbert Hugh Ian
    Irene Isaac Isabel Jack Jacob James Jane Janet Jason Jean Jennifer Jessica Joan John Jonathan
    Joseph Joyce Judith Julia Karen Kate Keith Kenneth Kevin Laura Lawrence Leonard Lillian Linda
    Louis Louise Lucy Margaret Maria Marion Mark Martha Martin Mary Matthew Michael Miriam Molly
    Nancy Nathan Nicholas Nora Norman Oliver Olivia Oscar Owen Pamela Patricia Patrick Paul Peter
    Philip Phyllis Ralph Raymond Rebecca Richard Robert Roger Ronald Rose Roy Ruth Samuel Sandra
    Sarah Sharon Simon Stanley Stella Stephen Susan Sylvia Theodore Thomas Timothy Ursula Vera
    Victor Vincent Violet Virginia Walter William
    """.split()
)

LAST_NAMES = tuple(
    """
    Abbott Adams Allen Anderson Andrews Archer Armstrong Arnold Atkins Bailey Baker Baldwin Ball
    Barker Barnes Barrett Bates Bell Bennett Berry Bishop Black Boyd Bradley Brooks Brown Bryant
    Burke Burns Burton Butler Campbell Carpenter Carr Carter Chapman Clark Cole Collins Cook
    Cooper Cox Craig Crawford Cross Cunningham Curtis Davidson Davis Dawson Dean Dixon Doyle
    Duncan Dunn Edwards Elliott Ellis Evans Ferguson Fisher Fletcher Ford Foster Fowler Fox
    Francis Freeman Gardner Gibson Gilbert Gordon Graham Grant Gray Green Griffin Hall Hamilton
    Hansen Harper Harris Harrison Hart Harvey Hawkins Hayes Henderson Hicks Hill Holmes Howard
    Howell Hudson Hughes Hunt Hunter Jackson Jenkins Jensen Johnson Jones Jordan Kelly Kennedy
    King Knight Lambert Lane Larson Lawson Lewis Little Long Lynch Marsh Marshall Mason Matthews
    Mills Mitchell Moore Morgan Morris Morrison Murphy Murray Myers Nelson Newman Newton Nichols
    Norris Oliver Olson Owens Palmer Parker Parsons Payne Perkins Perry Peters Peterson Phillips
    Porter Powell Price Reed Reynolds Richards Roberts Robinson Rogers Ross Russell Ryan Sanders
    Scott Shaw Simmons Simpson Sims Smith Snyder Spencer Stevens Stewart Stone Sullivan Taylor
    Thompson Tucker Turner Wagner Walker Wallace Ward Warren Watkins Watson Weaver Webb Wells
    West Wheeler White Wilson Wood Woods Wright Young
    """.split()
)
