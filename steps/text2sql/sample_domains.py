"""The business domains behind the built-in dataset: their tables, columns and pools of values.

A table is one call: `_table("table name/singular noun", *parents, column=pool, ...)`; "/id" after the noun
names the key column, which is otherwise `<noun>_id`. Parents are tables of the same domain, listed before it,
and each adds the column `<parent's noun>_id`. The first column is what a row is called by in questions.
A pool is one of:

- "a|b|c": words, few enough to group by; "a|b + c|d": names put together from one part of each side
- `_amount(low, high)`: a number that may be added up; `_level(low, high)`: one that may only be averaged;
  whole numbers make INTEGER columns, others REAL
- `DATE`: a day as 'YYYY-MM-DD'
- `Maybe(pool)`: any of these, with NULLs

Table names are unique over all domains: a table shared by two would tie them together in the split by schema.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Number(NamedTuple):
    """A range of numbers, both ends included."""

    low: float
    high: float
    adds_up: bool  # a sum over rows means something: true of a price, not of an age


class Maybe(NamedTuple):
    """A pool whose column also holds NULLs."""

    pool: str


Pool = str | Number | Maybe


@dataclass(frozen=True)
class Table:
    """One table; `columns` leaves out the key and the parents' keys."""

    name: str
    one: str
    key: str
    parents: tuple[str, ...]
    columns: dict[str, Pool]

    @property
    def foreign_key(self) -> str:
        """The column that points here from a child."""
        return f"{self.one.replace(' ', '_')}_id"


@dataclass(frozen=True)
class Domain:
    """Related tables, parents before children."""

    name: str
    tables: tuple[Table, ...]

    def table(self, name: str) -> Table:
        """The table of this name."""
        return next(table for table in self.tables if table.name == name)


def _table(spec: str, /, *parents: str, **columns: Pool) -> Table:
    name, one, *key = spec.split("/")
    return Table(name, one, key[0] if key else f"{one.replace(' ', '_')}_id", parents, columns)


def _domain(name: str, *tables: Table) -> Domain:
    return Domain(name, tables)


def _amount(low: float, high: float) -> Number:
    return Number(low, high, adds_up=True)


def _level(low: float, high: float) -> Number:
    return Number(low, high, adds_up=False)


DATE = "YYYY-MM-DD"
# Some names hold an apostrophe, so that answers with a doubled quote occur.
PERSON = (
    "Alice|Omar|Chloe|Daniel|Elena|Felix|Grace|Hiro|Isla|Jonas|Kavya|Liam|Maria|Noah|Olivia|Pedro|Ruth|Samuel"
    "|Tara|Victor|Wendy|Yusuf|Zoe|Aaron|Bianca|Carlos + Adams|Brown|Chen|Diaz|Evans|Fischer|Garcia|Hughes"
    "|Ivanov|Jones|Khan|Lopez|Meyer|Novak|O'Brien|Patel|Quinn|Rossi|Silva|Turner|Walker|Young|D'Angelo"
)
CITY = "Leeds|Bristol|Madrid|Lyon|Boston|Denver|Oslo|Porto|Austin|Hamburg"
COUNTRY = "France|Spain|Japan|Brazil|Canada|Kenya|India|Norway|Mexico"

# Written by hand at a few lines a table, which the formatter would spread over a line a column.
# fmt: off
DOMAINS: tuple[Domain, ...] = (
    _domain(
        "hospital",
        _table("patients/patient", name=PERSON, city=CITY, age=_level(1, 95),
               blood_type="A+|A-|B+|O+|O-|AB+", weight_kg=_level(40.0, 120.0),
               email=Maybe("pat|mail|home + @post.org|@inbox.com|@web.net")),
        _table("doctors/doctor", name=PERSON, specialty="Cardiology|Neurology|Oncology|Pediatrics|Surgery",
               salary=_amount(60000, 190000), hire_date=DATE),
        _table("visits/visit", "patients", "doctors", ward="North|South|East|West|Maternity",
               visit_date=DATE, cost=_amount(40.0, 2500.0),
               reason="Checkup|Fever|Injury|Follow-up|Vaccination"),
    ),
    _domain(
        "library",
        _table("authors/author", name=PERSON, country=COUNTRY, birth_year=_level(1900, 1995)),
        _table("books/book", "authors", title="Silent|Golden|Lost|Hidden|Last|Broken|Winter + River|Garden"
               "|City|Letter|Mirror|Island|Road", genre="Fantasy|Mystery|History|Poetry|Science",
               page_count=_amount(80, 900), published_year=_level(1950, 2023),
               language="English|French|German|Spanish"),
        _table("loans/loan", "books", borrower=PERSON, loan_date=DATE, return_date=Maybe(DATE),
               fine=_amount(0.0, 20.0), branch="Central|Riverside|Hillside|Parkway"),
    ),
    _domain(
        "airline",
        _table("airlines/airline/id", name="Sky|Blue|Nordic|Coastal|Royal|Swift|Alpine + Air|Wings|Jet"
               "|Airways", country=COUNTRY, fleet_size=_amount(4, 300), founded_year=_level(1930, 2020),
               alliance=Maybe("Star|Oneworld|SkyTeam")),
        _table("flights/flight/id", "airlines",
               flight_number="BA|LH|AF|QX|UN|ZT + 101|117|204|342|458|561|770",
               origin="London|Paris|Tokyo|Dubai|Chicago", destination="Rome|Lima|Sydney|Cairo|Toronto",
               departure_date=DATE, distance_km=_amount(300, 15000), ticket_price=_amount(35.0, 1900.0),
               status="On time|Delayed|Cancelled"),
    ),
    _domain(
        "gym",
        _table("members/member", name=PERSON, age=_level(16, 80), plan="Basic|Plus|Premium|Student",
               join_date=DATE, monthly_fee=_amount(15.0, 90.0),
               phone=Maybe("555 + 0101|0134|0177|0192|0260")),
        _table("workouts/workout", "members", activity="Yoga|Spinning|Boxing|Rowing|Pilates",
               workout_date=DATE, duration_minutes=_amount(15, 120), calorie_count=_amount(80, 1100),
               intensity="Low|Medium|High"),
    ),
    _domain(
        "school",
        _table("teachers/teacher", name=PERSON, subject="Math|History|Biology|Art|Music|Geography",
               salary=_amount(28000, 70000), hire_date=DATE),
        _table("pupils/pupil", "teachers", name=PERSON, grade=_level(1, 12), house="Red|Blue|Green|Yellow",
               height_cm=_level(110.0, 190.0), absence_count=_amount(0, 25),
               allergy=Maybe("Nuts|Milk|Eggs")),
    ),
    _domain(
        "logistics",
        _table("warehouses/warehouse", name="North|South|East|West|Central|Harbor|Valley + Depot|Hub|Center"
               "|Yard", city=CITY, capacity=_amount(500, 20000), manager=PERSON),
        _table("shipments/shipment", "warehouses",
               tracking_code="TR|SH|PK|LX + 1001|1042|2077|3310|4581|5960", carrier="DHL|FedEx|UPS|Maersk",
               weight_kg=_amount(0.5, 900.0), ship_date=DATE, delivery_date=Maybe(DATE),
               status="Pending|In transit|Delivered|Returned"),
    ),
    _domain(
        "restaurant",
        _table("restaurant/restaurant", name="Golden|Little|Old|Spicy|Green|Royal + Spoon|Dragon|Kitchen"
               "|Table|Oven|Fork", cuisine="Italian|Thai|Indian|Mexican|French", city=CITY,
               rating=_level(1.0, 5.0), seat_count=_amount(12, 180)),
        _table("dish/dish", "restaurant", dish_name="Grilled|Baked|Smoked|Crispy|Creamy|Roasted + Salmon"
               "|Tofu|Chicken|Mushrooms|Lamb|Pasta", course="Starter|Main|Dessert|Side",
               price=_level(4.0, 48.0), calorie_count=_amount(90, 1300),
               allergen=Maybe("Gluten|Nuts|Dairy|Soy")),
        _table("review/review", "restaurant", reviewer=PERSON, star_rating=_level(1, 5), review_date=DATE,
               vote_count=_amount(0, 60), platform="Web|App|Email"),
    ),
    _domain(
        "real_estate",
        _table("agents/agent", name=PERSON, agency="Homely|Keystone|Urban Nest|Prime Estates",
               commission_rate=_level(1.0, 6.0), license_year=_level(1995, 2023)),
        _table("properties/property", "agents", address="12|7|48|103|256|9|31 + Oak Street|Mill Lane"
               "|High Road|Park Avenue|Lake Drive", property_type="House|Apartment|Studio|Villa", city=CITY,
               price=_amount(80000, 950000), bedroom_count=_amount(1, 6), area_sqm=_amount(25.0, 400.0),
               sold_date=Maybe(DATE), listed_date=DATE),
    ),
    _domain(
        "bank",
        _table("customers/customer", name=PERSON, city=CITY, credit_score=_level(300, 850), join_date=DATE,
               segment="Retail|Private|Business"),
        _table("accounts/account", "customers", account_type="Checking|Savings|Joint|Student",
               balance=_amount(-500.0, 60000.0), opened_date=DATE, currency="EUR|USD|GBP|JPY",
               closed_date=Maybe(DATE)),
        _table("transactions/transaction", "accounts", merchant="Grocer|Fuel Stop|Bookshop|Cafe|Pharmacy",
               amount=_amount(1.0, 900.0), transaction_date=DATE, channel="Card|Transfer|Cash|Online"),
    ),
    _domain(
        "hotel",
        _table("hotels/hotel/id", name="Grand|Park|Ocean|Royal|Garden|Station + Palace|Inn|Lodge|Suites"
               "|Plaza", city=CITY, star_rating=_level(1, 5), room_count=_amount(10, 400),
               opened_year=_level(1920, 2022)),
        _table("bookings/booking/id", "hotels", guest=PERSON, room_type="Single|Double|Suite|Family",
               arrival_date=DATE, night_count=_amount(1, 14), total_price=_amount(60.0, 4000.0),
               special_request=Maybe("Late arrival|Baby cot|Quiet room|Sea view")),
    ),
    _domain(
        "cinema",
        _table("movies/movie", title="Midnight|Crimson|Secret|Final|Electric|Frozen + Train|Harvest|Promise"
               "|Empire|Signal|Dance", genre="Drama|Comedy|Action|Horror|Animation", director=PERSON,
               release_year=_level(1970, 2024), duration_minutes=_level(75, 200)),
        _table("screenings/screening", "movies", hall="Hall A|Hall B|Hall C|Hall D", screening_date=DATE,
               ticket_price=_level(6.0, 25.0), audience_size=_amount(0, 260),
               sponsor=Maybe("Cola Co|Snackers|Phonix")),
    ),
    _domain(
        "museum",
        _table("artists/artist", name=PERSON, nationality="French|Dutch|Italian|Mexican|Japanese",
               birth_year=_level(1500, 1980), movement=Maybe("Cubism|Baroque|Realism|Romanticism")),
        _table("artworks/artwork", "artists", title="Blue|Sleeping|Dancing|Broken|Ancient|Quiet + Horse"
               "|Figure|Harbor|Bridge|Lady|Field", medium="Oil|Marble|Bronze|Watercolor|Ink",
               gallery="East Wing|West Wing|Atrium|Tower", acquired_date=DATE,
               insured_value=_amount(1000, 900000)),
    ),
    _domain(
        "farm",
        _table("fields/field", name="Upper|Lower|River|Stone|Long|South + Meadow|Acre|Slope|Patch|Strip",
               soil_type="Clay|Sand|Loam|Peat", area_hectares=_amount(0.5, 60.0), elevation=_level(5, 800)),
        _table("harvests/harvest", "fields", crop="Wheat|Barley|Corn|Potato|Soybean", harvest_date=DATE,
               yield_tonnes=_amount(0.5, 200.0), quality="Low|Standard|Premium",
               worker_count=_amount(1, 30), buyer=Maybe("Agrimax|Millers Union|Green Foods")),
    ),
    _domain(
        "winery",
        _table("vineyards/vineyard", name="Chateau|Domaine|Villa|Casa|Quinta + Belmont|Rosario|Verde"
               "|Lacroix|Monte", region="Bordeaux|Rioja|Tuscany|Douro|Napa",
               founded_year=_level(1750, 2010), owner=PERSON),
        _table("wines/wine", "vineyards", label="Old|Noble|Wild|Silver|Black + Oak|Fox|Crown|Cellar|Hill",
               grape="Merlot|Syrah|Malbec|Riesling|Pinot Noir", vintage_year=_level(1990, 2023),
               price=_level(6.0, 320.0), alcohol_percent=_level(9.0, 15.5), score=_level(80, 100),
               bottled_date=DATE, award=Maybe("Gold|Silver|Bronze")),
    ),
    _domain(
        "insurance",
        _table("policyholders/policyholder", name=PERSON, state="Texas|Ohio|Nevada|Maine|Oregon",
               age=_level(18, 85), occupation="Nurse|Driver|Engineer|Chef|Clerk"),
        _table("policies/policy", "policyholders",
               policy_number="PN|HX|QA|ZB + 3001|3077|4120|5298|6643|7005",
               policy_type="Home|Auto|Life|Travel", premium=_amount(90.0, 2400.0), start_date=DATE,
               end_date=Maybe(DATE)),
        _table("claims/claim", "policies", cause="Fire|Theft|Flood|Collision|Storm",
               claim_amount=_amount(100, 50000), claim_date=DATE, decision="Approved|Rejected|Open",
               adjuster=PERSON),
    ),
    _domain(
        "software_team",
        _table("developers/developer/id", name=PERSON, team="Platform|Mobile|Data|Security",
               level="Junior|Senior|Lead|Principal", start_date=DATE, salary=_amount(45000, 180000)),
        _table("tickets/ticket/id", "developers", title="Fix|Improve|Remove|Test|Rewrite + login page"
               "|cache layer|search index|payment form|export job", priority="Low|Medium|High|Critical",
               status="Open|In review|Done|Blocked", created_date=DATE, closed_date=Maybe(DATE),
               effort=_amount(1, 13)),
    ),
    _domain(
        "car_rental",
        _table("cars/car", model="Astra|Civic|Focus|Golf|Corolla|Megane + Sport|Eco|Touring|Classic",
               fuel="Petrol|Diesel|Electric|Hybrid", color="Red|White|Black|Silver|Blue",
               mileage_km=_amount(500, 180000), daily_rate=_level(20.0, 150.0),
               build_year=_level(2008, 2024)),
        _table("rentals/rental", "cars", driver=PERSON, pickup_date=DATE, day_count=_amount(1, 30),
               pickup_station="Airport|Downtown|Harbor|Station",
               damage_note=Maybe("Scratch|Dent|Flat tire")),
    ),
    _domain(
        "online_shop",
        _table("suppliers/supplier", company="Nova|Apex|Terra|Orbit|Delta|Lumen + Trading|Goods|Supply"
               "|Imports", country=COUNTRY, contact=PERSON, reliability=_level(1.0, 10.0)),
        _table("products/product", "suppliers", product_name="Oak|Steel|Cotton|Glass|Leather|Bamboo + Lamp"
               "|Chair|Bag|Bowl|Shelf|Clock", category="Kitchen|Office|Garden|Bedroom",
               price=_level(3.0, 450.0), stock_quantity=_amount(0, 800),
               warranty=Maybe("1 year|2 years|5 years")),
        _table("sales/sale", "products", customer=PERSON, sale_date=DATE, quantity=_amount(1, 25),
               payment_method="Card|PayPal|Invoice|Voucher", discount=_amount(0.0, 40.0)),
    ),
    _domain(
        "music",
        _table("singer/singer", name=PERSON, country=COUNTRY, age=_level(18, 75),
               debut_year=_level(1970, 2022)),
        _table("album/album", "singer", title="Neon|Paper|Velvet|Desert|Lonely|Echo + Heart|Sky|Moon|Parade"
               "|Youth", genre="Pop|Rock|Jazz|Folk|Soul", release_date=DATE,
               copy_count=_amount(500, 900000), track_count=_amount(6, 22),
               record_label=Maybe("Sunrise|Bluebird|Monarch")),
    ),
    _domain(
        "football",
        _table("teams/team", name="Red|Royal|United|Iron|Golden|Northern + Lions|Eagles|Rovers|Wolves"
               "|Stars", city=CITY, coach=PERSON, stadium_capacity=_amount(2000, 80000),
               founded_year=_level(1880, 2005)),
        _table("players/player", "teams", name=PERSON, position="Goalkeeper|Defender|Midfielder|Striker",
               goal_count=_amount(0, 45), market_value=_amount(50000, 9000000), birth_date=DATE,
               injury=Maybe("Knee|Ankle|Shoulder")),
    ),
    _domain(
        "zoo",
        _table("enclosures/enclosure", name="Tropical|Polar|Desert|Forest|Lagoon|Savanna + Dome|House|Bay"
               "|Trail|Park", zone="North|South|East|West", area_sqm=_amount(20, 5000), keeper=PERSON,
               built_year=_level(1960, 2023)),
        _table("animals/animal", "enclosures",
               name="Big|Little|Lady|Sir|Old + Milo|Luna|Rocky|Bella|Simba|Coco",
               animal_type="Lion|Zebra|Penguin|Otter|Parrot", weight_kg=_level(0.5, 900.0),
               arrival_date=DATE, diet="Meat|Plants|Fish|Mixed", adopter=Maybe(PERSON)),
    ),
    _domain(
        "university",
        _table("department/department", name="Applied|Modern|Theoretical|Social|Digital + Physics"
               "|Linguistics|Economics|Chemistry|Design", campus="Main|North|Seaside|Old Town",
               budget=_amount(100000, 5000000), dean=PERSON),
        _table("student/student", "department", name=PERSON, degree="Bachelor|Master|Doctorate",
               gpa=_level(1.5, 4.0), enrollment_date=DATE, credit_count=_amount(0, 240),
               scholarship=Maybe("Merit|Need|Sports")),
        _table("thesis_project/project", "student", topic="Urban|Quantum|Coastal|Medieval + Noise|Trade"
               "|Erosion|Networks", supervisor=PERSON, mark=_level(1.0, 10.0), submission_date=DATE,
               status="Draft|Submitted|Accepted"),
    ),
    _domain(
        "publishing",
        _table("magazines/magazine", title="Daily|Modern|Global|Weekly|Urban + Cook|Traveler|Science|Style"
               "|Gardener", language="English|German|Polish|Spanish", circulation=_amount(1000, 400000),
               launch_year=_level(1930, 2021)),
        _table("articles/article", "magazines", headline="Ten|Why|How|Inside + Ways Home|Bees Matter"
               "|Cities Grow|Old Maps|Cheap Trains", section="Culture|Food|Nature|Money", journalist=PERSON,
               word_count=_amount(200, 6000), publish_date=DATE, photographer=Maybe(PERSON)),
    ),
    _domain(
        "telecom",
        _table("subscribers/subscriber", name=PERSON, city=CITY, tariff="Flex|Family|Unlimited|Prepaid",
               contract_date=DATE, monthly_charge=_amount(8.0, 75.0),
               referral=Maybe("Friend|Advert|Store")),
        _table("calls/call", "subscribers", call_type="Local|National|International|Roaming",
               call_date=DATE, duration_minutes=_amount(1, 180), charge=_amount(0.0, 30.0),
               network="4G|5G|WiFi"),
    ),
    _domain(
        "energy",
        _table("power_plants/power plant", name="Falcon|Ridge|Delta|Summit|Bay + Station|Works|Point|Park",
               energy_source="Wind|Solar|Hydro|Gas|Nuclear", country=COUNTRY, capacity_mw=_amount(5, 2000),
               opened_year=_level(1960, 2023)),
        _table("outages/outage", "power_plants", outage_cause="Storm|Maintenance|Overload|Fire",
               outage_date=DATE, duration_hours=_amount(1, 96), repair_cost=_amount(500.0, 90000.0),
               severity="Minor|Major|Severe", inspector=Maybe(PERSON)),
    ),
    _domain(
        "bus_network",
        _table("routes/route/id", name="Blue|Red|Green|Express|Night + Line|Loop|Link|Shuttle"
               "|Connector", operator="Metro Bus|City Lines|GoTransit", length_km=_amount(3.0, 60.0),
               stop_count=_amount(5, 50)),
        _table("drivers/driver/id", name=PERSON, license_class="B|C|D|E", hire_date=DATE,
               hourly_wage=_level(14.0, 38.0)),
        _table("trips/trip/id", "routes", "drivers", trip_date=DATE,
               vehicle="Minibus|Single deck|Double deck|Tram", passenger_count=_amount(0, 120),
               delay_minutes=_amount(0, 55), incident=Maybe("Traffic|Breakdown|Snow")),
    ),
    _domain(
        "charity",
        _table("donors/donor", name=PERSON, country=COUNTRY, donor_type="Individual|Company|Foundation",
               signup_date=DATE),
        _table("campaigns/campaign", campaign_name="Clean|Safe|Bright|Open + Water|Homes|Futures|Schools"
               "|Oceans", cause="Health|Education|Animals|Climate", goal=_amount(5000, 500000),
               start_date=DATE),
        _table("donations/donation", "donors", "campaigns", method="Card|Cheque|Cash|Bank transfer",
               amount=_amount(5.0, 5000.0), donation_date=DATE,
               message=Maybe("Good luck|In memory|Keep going")),
    ),
    _domain(
        "construction",
        _table("sites/site", name="Riverside|Maple|Station|Castle|Market + Tower|Bridge|Mall|Court|Arena",
               city=CITY, budget=_amount(200000, 9000000), architect=PERSON, start_date=DATE,
               completion_date=Maybe(DATE)),
        _table("workers/worker", "sites", name=PERSON, trade="Mason|Plumber|Welder|Roofer|Carpenter",
               hourly_rate=_level(12.0, 55.0), experience_years=_level(0, 40),
               certificate="Basic|Advanced|Master"),
    ),
    _domain(
        "podcasts",
        _table("podcasts/podcast", title="Morning|Deep|Curious|Hidden|Simple + Minds|History|Talk|Money"
               "|Stories", topic="Science|Business|Crime|Sports|Comedy", host=PERSON, launch_date=DATE,
               follower_count=_amount(50, 200000)),
        _table("episodes/episode", "podcasts", episode_title="Meeting|Finding|Losing|Asking + a Legend"
               "|the Truth|a Fortune|the Experts", guest=Maybe(PERSON), air_date=DATE,
               duration_minutes=_amount(10, 150), download_count=_amount(20, 90000),
               season="One|Two|Three|Four"),
    ),
    _domain(
        "pharmacy",
        _table("medicines/medicine", medicine_name="Alto|Benza|Cora|Dexi|Luma + zol Forte|min Plus|dine Max"
               "|pril Junior", form="Tablet|Syrup|Cream|Capsule",
               manufacturer="Helix|Panacea|Vitalis|Norpharm", unit_price=_level(1.0, 95.0),
               stock=_amount(0, 500), expiry_date=DATE),
        _table("prescriptions/prescription", "medicines", prescriber=PERSON, dosage_mg=_level(5, 800),
               issue_date=DATE, refill_count=_amount(0, 12), insurer=Maybe("Medica|Carewell|Unity"),
               urgency="Routine|Urgent|Emergency"),
    ),
    _domain(
        "veterinary",
        _table("owners/owner", name=PERSON, town="Ashby|Corby|Melton|Ripley|Selby",
               phone=Maybe("0117 + 4401|4522|4790|4833"), registered_date=DATE),
        _table("pets/pet", "owners", pet_name="Fluffy|Max|Daisy|Rex|Kiwi|Oreo|Ginger|Shadow + Junior|Senior"
               "|the Brave", breed="Dog|Cat|Rabbit|Hamster", age=_level(0, 18),
               weight_kg=_level(0.2, 60.0)),
        _table("treatments/treatment", "pets", treatment_type="Surgery|Vaccination|Dental|Grooming",
               vet=PERSON, treatment_date=DATE, fee=_amount(15.0, 900.0),
               outcome="Recovered|Ongoing|Referred"),
    ),
    _domain(
        "bakery",
        _table("pastries/pastry", name="Almond|Cherry|Lemon|Walnut|Vanilla + Tart|Roll|Muffin|Croissant"
               "|Pie", flavor="Sweet|Salty|Sour|Spicy", price=_level(1.0, 9.5),
               calorie_count=_amount(120, 700), introduced_date=DATE),
        _table("orders/order", "pastries", client=PERSON, order_date=DATE, quantity=_amount(1, 60),
               delivery="Pickup|Courier|Shipping", note=Maybe("Gift wrap|No sugar|Birthday")),
    ),
    _domain(
        "law_firm",
        _table("lawyers/lawyer", name=PERSON, practice_area="Tax|Family|Criminal|Labor|Patent",
               hourly_fee=_level(80, 600), bar_year=_level(1980, 2022), office=CITY),
        _table("legal_cases/case", "lawyers", case_title="State|Bank|Union|Estate + v. Harper|v. Lindgren"
               "|v. Moreau|v. Osei|v. Tanaka", court="District|Appeal|Supreme|Labor", filed_date=DATE,
               closed_date=Maybe(DATE), hour_count=_amount(2, 400), result="Won|Lost|Settled|Pending"),
    ),
    _domain(
        "harbor",
        _table("ships/ship", name="Northern|Sea|Ocean|Silver|Brave + Star|Spirit|Pearl|Wind|Queen",
               flag="Panama|Liberia|Malta|Greece|Norway", ship_type="Tanker|Ferry|Cruise|Container",
               length_m=_level(20.0, 400.0), built_year=_level(1975, 2023), captain=PERSON),
        _table("dockings/docking", "ships", pier="P1|P2|P3|P4|P5", arrival_date=DATE,
               stay_days=_amount(1, 21), cargo_tonnes=_amount(10, 20000),
               docking_fee=_amount(200.0, 15000.0), pilot=Maybe(PERSON)),
    ),
    _domain(
        "events",
        _table("venues/venue", name="Crystal|Old|Garden|Sunset|Union + Hall|Theater|Pavilion|Terrace|Arena",
               city=CITY, capacity=_amount(30, 5000), daily_rent=_level(150.0, 9000.0)),
        _table("concerts/concert", "venues", band="Silver|Angry|Happy|Electric|Tiny + Cats|Robots|Pilots"
               "|Clouds|Giants", concert_date=DATE, attendance=_amount(10, 4800),
               style="Rock|Classical|Jazz|Electronic", ticket_price=_level(8.0, 160.0),
               opening_act=Maybe("DJ Miko|The Larks|Anna Bell")),
    ),
    _domain(
        "recruiting",
        _table("companies/company", name="Bright|Vector|Summit|Pioneer|Cedar + Labs|Systems|Foods"
               "|Motors", industry="Software|Retail|Energy|Health|Finance", city=CITY,
               employee_count=_amount(5, 20000), revenue_millions=_amount(0.5, 900.0)),
        _table("job_openings/job opening/id", "companies", job_title="Junior|Senior|Chief"
               "|Assistant + Analyst|Designer|Accountant|Engineer|Buyer",
               contract="Permanent|Temporary|Internship", offered_salary=_level(18000, 150000),
               posted_date=DATE, filled_date=Maybe(DATE), applicant_count=_amount(0, 300)),
    ),
)
# fmt: on
