"""Make the quickstart's data: a note in plain words in, one JSON object out.

Three kinds of notes (reminder, order, payment). Every name, task, item, date, time, amount and
phrasing of the held-out rows is absent from the training rows, so they cannot be answered from
memory. The same arguments give the same files, byte for byte:

    python recipes/data/reminders.py
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

SYSTEM = "Turn the note into JSON."

MONTHS = {
    "January": 31, "February": 28, "March": 31, "April": 30, "May": 31, "June": 30,
    "July": 31, "August": 31, "September": 30, "October": 31, "November": 30, "December": 31,
}  # fmt: skip
NUMBER_WORDS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve")
NUMBERS = dict(zip(NUMBER_WORDS, (*range(2, 11), 12), strict=True))
CURRENCIES = {"USD": ("${}", "{} dollars"), "EUR": ("€{}", "{} euros"), "GBP": ("£{}", "{} pounds")}
CENTS = (0, 25, 45, 75, 95, 99)


class Pool(NamedTuple):
    """The words that one side, training or held-out, is written with."""

    first_names: Sequence[str]
    last_names: Sequence[str]
    companies: Sequence[str]
    tasks: Sequence[str]
    items: Sequence[str]
    reminders: Sequence[str]
    orders: Sequence[str]
    payments: Sequence[str]
    held_out: bool


def _words(text: str) -> tuple[str, ...]:
    """The entries of a comma-separated text."""
    return tuple(" ".join(entry.split()) for entry in text.split(","))


def _pairs(left: str, right: str) -> tuple[str, ...]:
    """Every entry of one text with every entry of another."""
    return tuple(f"{first} {second}" for first in _words(left) for second in _words(right))


def _lines(text: str) -> tuple[str, ...]:
    """The lines of a text."""
    return tuple(line.strip() for line in text.strip().splitlines())


TRAIN = Pool(
    first_names=_words(
        "Aaliyah, Abel, Ada, Adele, Adrian, Agnes, Aisha, Akira, Alan, Albert, Alejandro, "
        "Alice, Amara, Amir, Amos, Anastasia, Andre, Angela, Anika, Annika, Antonia, Arjun, "
        "Arthur, Astrid, August, Axel, Ayesha, Barbara, Basil, Beatriz, Ben, Bernard, Bertha, "
        "Bianca, Bjorn, Boris, Brenda, Bruno, Camille, Carla, Cecilia, Cedric, Charlotte, Chen, "
        "Chloe, Clara, Claude, Conrad, Cornelia, Dagmar, Dalia, Damian, Dana, Daphne, David, "
        "Deepa, Demetrius, Dennis, Diego, Dimitri, Dolores, Dominic, Edgar, Edith, Eduardo, "
        "Elena, Elias, Eloise, Emil, Enrique, Erik, Ernest, Esther, Eugene, Eva, Fabian, "
        "Fatima, Felicity, Felix, Ferdinand, Fiona, Florence, Francesca, Frederick, Gabriel, "
        "Genevieve, George, Gerald, Gianna, Gilbert, Giovanni, Gloria, Grace, Gregory, Greta, "
        "Gunnar, Gwen, Hamid, Hana, Hannelore, Harold, Hassan, Hector, Helen, Henrik, Herbert, "
        "Hilda, Hiroshi, Hugo, Ida, Ignacio, Igor, Ilse, Imogen, Ines, Ingrid, Irene, Isaac, "
        "Isabel, Ivan, Jack, Jamal, Jane, Jasmine, Javier, Jerome, Jonas, Josephine, Juan, "
        "Julia, Kamala, Karim, Katarina, Kate, Keiko, Kenji, Konstantin, Kristin, Kwame, Lars, "
        "Laura, Leila, Leo, Leonard, Lina, Lorenzo, Louise, Lucas, Luis, Magnus, Malik, Manuel, "
        "Marcus, Margaret, Maria, Marta, Matilda, Maurice, Max, Mehmet, Melissa, Mia, Miguel, "
        "Milena, Mira, Mohammed, Monica, Morgan, Murad, Nadia, Nathan, Nicolas, Niels, Nina, "
        "Noah, Nora, Octavia, Olga, Oliver, Omar, Orlando, Oscar, Pablo, Pascal, Patricia, "
        "Paula, Pedro, Percy, Peter, Petra, Philippa, Rafael, Ramona, Raymond, Rebecca, "
        "Reginald, Renata, Ricardo, Robin, Roland, Rosa, Rosalind, Rudolf, Ruth, Sabine, Salma, "
        "Sam, Samira, Sara, Saskia, Sebastian, Selma, Sergei, Seth, Silvia, Simon, Sofia, "
        "Sonja, Stella, Sunita, Svetlana, Tamara, Tariq, Tatiana, Thandiwe, Theodore, Theresa, "
        "Tilda, Tobias, Tom, Ulrich, Ursula, Valentina, Vera, Victor, Vincent, Viola, Vladimir, "
        "Walter, Wanda, Wilhelm, Winston, Xavier, Yasmin, Yolanda, Yuki, Yusuf, Zachary, "
        "Zainab, Zoe"
    ),
    last_names=_words(
        "Abara, Ackerman, Adams, Adeyemi, Aguilar, Ahmed, Alvarez, Andersson, Archer, "
        "Armstrong, Ashworth, Baker, Balogun, Banerjee, Barnes, Bauer, Becker, Bell, Beltran, "
        "Bennett, Bergstrom, Bianchi, Blackwood, Bogdanov, Bradley, Brandt, Brown, Burgess, "
        "Cabrera, Callahan, Campbell, Cardoso, Carter, Castellano, Castro, Chan, Chandra, "
        "Chowdhury, Clark, Cohen, Cooper, Cordova, Crawford, Cruz, Dahl, Danso, Davidson, "
        "Delgado, Desai, Diaz, Dixon, Dominguez, Donovan, Drummond, Dvorak, Edwards, Ekstrom, "
        "Ellison, Engel, Espinoza, Estrada, Evans, Everett, Farouk, Fernandez, Figueroa, "
        "Fischer, Fitzgerald, Fleming, Fonseca, Fournier, Frost, Fujimoto, Galloway, Garcia, "
        "Gautier, Gibson, Goldberg, Gonzalez, Goodwin, Graham, Gray, Greenberg, Griffin, "
        "Gustafsson, Haddad, Hall, Hamilton, Hansen, Harrington, Hashimoto, Hawkins, Heinrich, "
        "Hernandez, Hill, Holloway, Horvath, Hussein, Ibarra, Iglesias, Ito, Jackson, Jacobs, "
        "Jankowski, Jensen, Jimenez, Kamara, Karlsson, Kaur, Keller, Kennedy, Khan, Kim, King, "
        "Kobayashi, Koch, Kowalski, Krause, Kumar, Lambert, Larsen, Laurent, Leclerc, Lee, "
        "Lombardi, Lopez, Lund, MacDonald, Mahmoud, Maldonado, Mancini, Marchetti, Marino, "
        "Martinez, Matsuda, Mazur, McCarthy, Mensah, Meyer, Mikkelsen, Mills, Mitchell, "
        "Montgomery, Morales, Moreau, Moreno, Moretti, Muller, Murphy, Murray, Nakamura, "
        "Navarro, Nguyen, Nielsen, Nilsson, Novak, Nwosu, Obrien, Odom, Okafor, Olsen, Ortega, "
        "Owens, Pacheco, Padilla, Parker, Patel, Pavlov, Pereira, Perez, Petersen, Petrov, "
        "Pham, Popescu, Porter, Radcliffe, Ramirez, Rao, Reed, Reinhardt, Ricci, Richter, "
        "Rivera, Robinson, Rodrigues, Rosen, Rossi, Russo, Saito, Salazar, Santoro, Sato, "
        "Schmidt, Schneider, Schultz, Scott, Shah, Shapiro, Sharma, Silva, Simmons, Singh, "
        "Solberg, Soto, Stewart, Stone, Strand, Sullivan, Suzuki, Svensson, Takahashi, Taylor, "
        "Thomsen, Thornton, Torres, Tran, Turner, Underwood, Urbina, Valdez, Vargas, Vasquez, "
        "Virtanen, Vogel, Volkov, Wagner, Walker, Wallace, Watanabe, Weber, Webster, Weiss, "
        "Whitaker, White, Williams, Wilson, Winter, Wojcik, Wong, Wright, Yamamoto, Yilmaz, "
        "Young, Zhang, Zimmerman"
    ),
    companies=_words(
        "Alder Dental, Apex Heating, Beacon Insurance, Bluebird Travel, Brightside Cleaning, "
        "Cedar Press, City Water, Copper Kettle, Delta Hosting, Evergreen Lawns, Fairview School, "
        "Fox Motors, Golden Gym, Harbour Rentals, Hilltop Storage, Iris Flowers, Keystone Legal, "
        "Lakeside Clinic, Maple Bakery, Metro Gas, Moonlight Catering, North Bank, Oak Furniture, "
        "Orbit Telecom, Pioneer Paint, Quick Courier, Redwood Roofing, River Energy, Sapphire Spa, "
        "Silver Optics, Stone Masonry, Summit Books, Sunny Daycare, Swift Tyres, Tidal Pools, "
        "Union Parking, Valley Farms, Velvet Tailors, Westside Vet, Willow Design"
    ),
    tasks=_pairs(
        "check, clean, collect, move, repair, pack, label, count, order, sell, paint, "
        "photograph, measure, return, borrow, find, wrap, unpack, store, replace, inspect, buy, "
        "bring back, pick up, drop off, look for, put away, take out, set up, sort out, test, "
        "describe, compare, deliver, wash, hide, open, show, lock, throw away, draw, mend, "
        "carry, weigh, sketch, dust, empty, fill, cover, copy, print, scan, mail, post, sign, "
        "stamp, list, lend, rent, hang, fold, iron, dry, soak, scrub, sand, oil, paint over, "
        "glue, tie, cut, trim, water, dig up, plant, pull out, burn, melt, cool, heat, charge, "
        "switch off, turn on, plug in, reset, update, record, film, play, tune, learn, study, "
        "read, review, explain, mention, discuss, choose, reserve, cancel, confirm, exchange, "
        "give away, donate, bring in, carry out, line up, stack, spread, mix, stir, taste, "
        "serve, share, divide, shorten, stretch, bend, press, push, roll, lift, raise, lower, "
        "tow, park, load, unload, ship, track, guard, visit, tidy, swap, rebuild, upgrade, "
        "register, insure",
        "the blue boxes, the garden chairs, the old printer, the kitchen tap, the spare keys, "
        "the library books, the dry cleaning, the parcel, the tickets, the invoices, the "
        "projector, the curtains, the bicycle, the fridge, the bird feeder, the laptop, the "
        "smoke alarm, the front tyres, the suitcase, the windows, the new glasses, the "
        "passport, the lease, the router, the knives, the guitar, the firewood, the bed sheets, "
        "the winter coats, the dishwasher, the slides, the camera, the tool shed, the radio, "
        "the letterbox, the ladder, the office plants, the coffee machine, the birthday cake, "
        "the first aid kit, the chess board, the picnic basket, the sofa, the door handle, the "
        "lawn mower, the map of Rome, the wedding dress, the seed packets, the violin, the wine "
        "rack, the tea set, the water filter, the red umbrella, the heater, the bunk bed, the "
        "contract, the microphone, the paint brushes, the swimming gear, the tablecloth, the "
        "telescope, the train set, the vegetables, the visitor badges, the walking boots, the "
        "whiteboard, the gift cards, the recipe cards, the desk lamp, the hammock, the piano, "
        "the garage door, the two mirrors, the jigsaw, the horse trailer, the summer dress, the "
        "barn, the soup, the bread dough, the apple tree, the roses, the duck pond, the cat "
        "flap, the rabbit hutch, the puppy, the aquarium, the bus pass, the exam papers, the "
        "survey, the budget, the annual report, the logo, the website, the old emails, the "
        "password, the phone line, the screens, the speakers, the costumes, the stage lights, "
        "the drums, the choir robes, the banners, the tent, the sleeping bags, the canoe, the "
        "fishing rods, the skis, the helmet, the brakes, the exhaust pipe, the caravan, the "
        "boat engine, the anchor, the oars, the sails, the chimney, the drain pipes, the roof "
        "tiles, the fence, the gate, the driveway, the cellar, the attic, the bookcase, the "
        "wardrobe, the cradle, the pram, the toys, the crayons, the homework, the lunch boxes, "
        "the medicine, the bandages",
    ),
    items=_pairs(
        "blue, large, small, cotton, wooden, green, second-hand, organic, red, silver, plain, "
        "striped, Italian, glass, spare, round, yellow, paper, cheap, leather, dark, gold, "
        "garden, steel, wool, light, soft, white, brown, plastic, heavy, winter, children's, "
        "fresh, black, long, square, orange, handmade, dried, purple, pink, grey, beige, "
        "narrow, wide, thick, thin, short, tall, tiny, giant, oval, flat, curved, pointed, "
        "smooth, rough, shiny, matt, painted, printed, knitted, sewn, carved, folding, rolling, "
        "hanging, floating, electric, solar, magnetic, digital, antique, modern, rustic, "
        "French, Spanish, Indian, Chinese, Swedish, Greek, Irish, rubber, ceramic, iron, tin, "
        "silk, denim, felt, cork, stone, oak, pine, walnut, cherry, sweet, salty, spicy, sour, "
        "bitter, smoked, roasted, frozen, tinned, raw, ripe, spring, summer, autumn, office, "
        "school, kitchen, bathroom, travel, camping, party, wedding, baby",
        "candles, notebooks, chairs, mugs, brushes, lamps, bottles, socks, pans, bulbs, towels, "
        "shirts, frames, tennis balls, phone cases, lemon cakes, glasses, plant pots, door "
        "handles, chess sets, coats, pens, cheese pies, tea pots, floor mats, clocks, apples, "
        "belts, goat cheeses, curtains, envelopes, pillows, tubes, jam jars, soup bowls, "
        "gloves, blankets, soap bars, scales, ink cartridges, crackers, shelves, scarves, water "
        "jugs, dog leads, cork boards, baskets, tent pegs, pasta machines, cushions, bread "
        "knives, puzzles, hats, guitar strings, biscuits, cords, mushroom soups, boxes, spoons, "
        "kites, keyboards, ropes, buckets, beads, flags, tiles for the roof, rings, drums, "
        "sponges, tulips, plates, forks, trays for tea, napkin rings, tablets, chargers, "
        "cables, plugs, screws, nails, hammers, saws, drills, wrenches, pliers, ladders, "
        "wheels, pumps, bells, whistles, masks, wigs, capes, boots, sandals, slippers, jackets, "
        "sweaters, skirts, ties, buttons, zips, needles, threads, ribbons for hats, stickers, "
        "stamps, cards for the post, posters, magnets, globes, maps, compasses, tents, stoves, "
        "flasks, coolers, hoses, rakes, spades, seeds, roses, ferns, figs, plums, onions, "
        "carrots, peppers, sausages, waffles, muffins, jellies, sauces, pickles, olives, "
        "noodles, cereals, juices, teas, coffees",
    ),
    reminders=_lines("""
        Remind {person} to {task} on {date} at {time}.
        Remind {person} on {date} at {time} to {task}.
        On {date} at {time}, remind {person} to {task}.
        At {time} on {date}, {person} has to {task}.
        {person} needs to {task} at {time} on {date}.
        {person} must {task} on {date}, {time}.
        Please tell {person} to {task} on {date} at {time}.
        Set a reminder for {person}: {task}, {date}, {time}.
        Reminder for {date}, {time}: {person} should {task}.
        Can you make sure {person} remembers to {task} at {time} on {date}?
        {date}, {time}: {task} ({person}).
        Don't let {person} forget to {task} on {date} at {time}!
        I want {person} to {task} on {date}, at {time} sharp.
        New task for {person}, {date} at {time}: {task}.
        Ask {person} to {task}. It has to be on {date} at {time}.
        {person} promised to {task} on {date} at {time}.
        """),
    orders=_lines("""
        {person} ordered {quantity} {item} at {price} each.
        Order for {person}: {quantity} {item}, {price} each.
        {person} would like {quantity} {item} for {price} apiece.
        Please send {quantity} {item} to {person} at {price} each.
        {quantity} {item} for {person}, {price} per piece.
        Sold {quantity} {item} to {person} for {price} each.
        New order: {quantity} {item} at {price}, customer {person}.
        Customer {person} wants {quantity} {item} priced at {price}.
        We need {quantity} {item} for {person}, each costs {price}.
        {person} is buying {quantity} {item}. Unit price {price}.
        Can {person} get {quantity} {item} at {price} each?
        At {price} each, {person} takes {quantity} {item}.
        Put {quantity} {item} on the account of {person}, {price} each.
        {person} bought {quantity} {item} and paid {price} for each one.
        Ship {quantity} {item} ({price} each) to {person}.
        I promised {person} {quantity} {item} at {price} per unit.
        """),
    payments=_lines("""
        Pay {company} {amount} by {date}.
        Pay {amount} to {company} by {date}.
        We owe {company} {amount}, due on {date}.
        {company} expects {amount} by {date}.
        The bill from {company} over {amount} is due {date}.
        Transfer {amount} to {company} before {date}.
        By {date} we have to pay {company} {amount}.
        Invoice from {company}: {amount}, due {date}.
        {amount} goes to {company} on {date}.
        Please settle the {amount} for {company} by {date}.
        {company} sent a bill for {amount}. It is due on {date}.
        Due {date}: {amount} to {company}.
        Schedule a payment of {amount} to {company} for {date}.
        Could you pay {company} the {amount} by {date}?
        On {date}, send {company} {amount}.
        {company} charges us {amount} on {date}.
        """),
    held_out=False,
)

HELD_OUT = Pool(
    first_names=_words(
        "Anton, Beatrice, Cyrus, Dorothy, Esteban, Farah, Gustav, Harriet, Ibrahim, Joanna, "
        "Kofi, Lydia, Mateo, Naomi, Otto, Priya, Quentin, Rania, Stefan, Wendy"
    ),
    last_names=_words(
        "Abbott, Barros, Coleman, Dubois, Eriksen, Ferrari, Gupta, Hoffman, Ivanov, Johnson, "
        "Kaplan, Lindgren, Mendes, Nair, Osborne, Quinn, Romero, Sanders, Tanaka, Vance"
    ),
    companies=_words(
        "Amber Plumbing, Birch Accounting, Coral Aquatics, Dawn Nursery, Eagle Glass, "
        "Falcon Freight, Granite Kitchens, Juniper Yoga, Lantern Electric, Meadow Dairy, "
        "Nova Fitness, Pearl Jewellers"
    ),
    tasks=_words(
        "rake the leaves, phone the electrician, repaint the balcony, submit the tax forms, "
        "brush the pony, clear the gutters, proofread the thesis, translate the letter, polish "
        "the shoes, fetch the carpet, unlock the church hall, rehearse the speech, download the "
        "photos, vacuum the stairs, feed the goldfish, hand over the folding tables, harvest "
        "the potatoes, repot the orchids, renew the parking permit, call the dentist, walk the "
        "dog, book a table for six, meet the landlord, write the minutes, ring the plumber, "
        "sweep the porch, defrost the freezer, chop the onions, weed the flower beds, hire a "
        "van, interview the new cook, back up the server, order fresh milk, tip the porter, "
        "greet the guests, shovel the snow, sharpen the pencils, rinse the jars, refill the "
        "stapler, cash the cheque"
    ),
    items=_words(
        "yoga mats, pepper mills, velvet ribbons, copper wires, honey jars, birthday cards, "
        "marble tiles, walking sticks, almond tarts, toy trains, feather dusters, brass hooks, "
        "canvas bags, peach pies, snow shovels, linen napkins, bamboo trays, vanilla puddings, "
        "reading lamps, fountain pens, picture books, sun hats, rain jackets, apricot buns, "
        "garlic presses, cake tins, wine coolers, oven gloves, laundry bins, fruit bowls, desk "
        "fans, bicycle pumps, camping stools, swim goggles, hair clips, paint rollers, ginger "
        "biscuits, tomato plants, salad forks, jewel boxes"
    ),
    reminders=_lines("""
        Make {person} {task} on {date} at {time}, please.
        On {date}, {person} wants to {task} at {time}.
        Note for {person}: {task} at {time} on {date}.
        {person} should not forget to {task} on {date} at {time}.
        It is up to {person} to {task} on {date}, {time}.
        At {time} on {date} {person} is going to {task}.
        """),
    orders=_lines("""
        {person} asked for {quantity} {item} at {price} each.
        Deliver {quantity} {item} to {person}, {price} each.
        {person} takes {quantity} {item}, and each is {price}.
        Reserve {quantity} {item} at {price} apiece for {person}.
        {quantity} {item} at {price} each go to {person}.
        For {person}: {quantity} {item} at a price of {price}.
        """),
    payments=_lines("""
        Remember to pay {company} {amount} by {date}.
        {company} wants {amount} from us by {date}.
        We must send {amount} to {company} by {date}.
        A payment of {amount} to {company} is due on {date}.
        The {amount} for {company} must be paid by {date}.
        {date} is the last day to pay {company} {amount}.
        """),
    held_out=True,
)


def _pick(rng: Random, choices: Sequence[Any]) -> Any:
    """Any one of the choices; only `random()` is promised to be the same in every Python."""
    return choices[int(rng.random() * len(choices))]


def is_held_out(number: int) -> bool:
    """Whether a day, minute or amount belongs to the held-out side: every seventh does."""
    return number % 7 == 3


def _number(rng: Random, pool: Pool, draw: Callable[[], int]) -> int:
    """A drawn number that belongs to the pool's side."""
    while is_held_out(number := draw()) != pool.held_out:
        pass
    return number


def _person(rng: Random, pool: Pool) -> str:
    """A full name."""
    return f"{_pick(rng, pool.first_names)} {_pick(rng, pool.last_names)}"


def _date(rng: Random, pool: Pool) -> tuple[str, str]:
    """A date as the note writes it, and as the reply does: `March 14`, `14 March`."""
    days = [(day, month) for month, length in MONTHS.items() for day in range(1, length + 1)]
    day, month = days[_number(rng, pool, lambda: int(rng.random() * len(days)))]
    written = _pick(rng, (f"{day} {month}", f"{day} {month}", f"{month} {day}"))
    return written, f"{day} {month}"


def _time(rng: Random, pool: Pool) -> str:
    """A time from 07:00 to 21:55, in steps of five minutes: `17:20`."""
    minutes = _number(rng, pool, lambda: 7 * 60 + 5 * int(rng.random() * 15 * 12))
    return f"{minutes // 60:02d}:{minutes % 60:02d}"


def _money(rng: Random, pool: Pool, most: int) -> tuple[str, int | float]:
    """An amount below `most` as the note writes it, and as a JSON number: `4.75`."""
    cents = _number(
        rng, pool, lambda: 100 * (1 + int(rng.random() * (most - 1))) + _pick(rng, CENTS)
    )
    return (f"{cents / 100:.2f}", cents / 100) if cents % 100 else (str(cents // 100), cents // 100)


def _reminder(rng: Random, pool: Pool) -> tuple[str, dict[str, Any]]:
    """A note about something to do, and its JSON object."""
    person, task = _person(rng, pool), _pick(rng, pool.tasks)
    (written_date, date), time = _date(rng, pool), _time(rng, pool)
    note = _pick(rng, pool.reminders).format(person=person, task=task, date=written_date, time=time)
    return note, {"type": "reminder", "who": person, "what": task, "date": date, "time": time}


def _order(rng: Random, pool: Pool) -> tuple[str, dict[str, Any]]:
    """A note about goods that somebody buys, and its JSON object."""
    person, item, word = _person(rng, pool), _pick(rng, pool.items), _pick(rng, NUMBER_WORDS)
    written_price, price = _money(rng, pool, 60)
    quantity = _pick(rng, (word, str(NUMBERS[word])))
    note = _pick(rng, pool.orders).format(
        person=person, item=item, quantity=quantity, price=f"${written_price}"
    )
    return note, {
        "type": "order", "customer": person, "item": item,
        "quantity": NUMBERS[word], "price": price,
    }  # fmt: skip


def _payment(rng: Random, pool: Pool) -> tuple[str, dict[str, Any]]:
    """A note about a bill, and its JSON object."""
    company, currency = _pick(rng, pool.companies), _pick(rng, tuple(CURRENCIES))
    (written_date, date), (written, amount) = _date(rng, pool), _money(rng, pool, 900)
    note = _pick(rng, pool.payments).format(
        company=company, amount=_pick(rng, CURRENCIES[currency]).format(written), date=written_date
    )
    return note, {
        "type": "payment", "payee": company, "amount": amount, "currency": currency, "due": date,
    }  # fmt: skip


def rows(count: int, pool: Pool, seed: int) -> list[dict[str, Any]]:
    """`count` different rows of one side, the three kinds in turn."""
    rng = Random(f"{seed}-{pool.held_out}")
    seen: dict[str, dict[str, Any]] = {}
    while len(seen) < count:
        note, answer = (_reminder, _order, _payment)[len(seen) % 3](rng, pool)
        note = note[0].upper() + note[1:]
        seen[note] = {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": note},
                {"role": "assistant", "content": json.dumps(answer)},
            ]
        }
    return list(seen.values())


def write(path: Path, content: list[dict[str, Any]]) -> None:
    """Write rows as JSON lines."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    path.write_text(text, encoding="utf-8", newline="\n")


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description="Make the quickstart's data.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to fill")
    parser.add_argument("--train", type=int, default=1400, help="rows to train on")
    parser.add_argument("--heldout", type=int, default=120, help="rows held out")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other rows")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / "reminders.train.jsonl", rows(args.train, TRAIN, args.seed))
    write(args.out / "reminders.heldout.jsonl", rows(args.heldout, HELD_OUT, args.seed))


if __name__ == "__main__":
    main()
