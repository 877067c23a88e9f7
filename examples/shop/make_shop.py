"""Make shop.sqlite, and shop.csv: 59 questions about it, each with the SQL that answers it."""

import csv
import sqlite3

SCHEMA = """\
CREATE TABLE products (name TEXT, category TEXT, price REAL, stock INTEGER);
CREATE TABLE orders (product TEXT, customer TEXT, quantity INTEGER);
"""
PRODUCTS = [
    ("pen", "office", 2, 90),
    ("desk", "furniture", 190, 4),
    ("lamp", "light", 35, 12),
    ("chair", "furniture", 80, 9),
]
ORDERS = [
    ("pen", "Ada", 10),
    ("desk", "Ada", 1),
    ("lamp", "Grace", 2),
    ("chair", "Linus", 4),
    ("pen", "Linus", 5),
]

with sqlite3.connect("shop.sqlite") as shop:
    shop.executescript(SCHEMA)
    shop.executemany("INSERT INTO products VALUES (?, ?, ?, ?)", PRODUCTS)
    shop.executemany("INSERT INTO orders VALUES (?, ?, ?)", ORDERS)

asked = []
for name, _, _, _ in PRODUCTS:
    asked.append((f"What does a {name} cost?", f"SELECT price FROM products WHERE name = '{name}'"))
    asked.append((f"How many {name}s are in stock?", f"SELECT stock FROM products WHERE name = '{name}'"))
    asked.append((f"Who ordered a {name}?", f"SELECT customer FROM orders WHERE product = '{name}'"))
    asked.append(
        (f"How many {name}s were ordered?", f"SELECT SUM(quantity) FROM orders WHERE product = '{name}'")
    )
for limit in range(5, 105, 5):
    asked.append(
        (f"Which products cost more than {limit}?", f"SELECT name FROM products WHERE price > {limit}")
    )
    asked.append(
        (
            f"Which products have fewer than {limit} in stock?",
            f"SELECT name FROM products WHERE stock < {limit}",
        )
    )
for customer in ("Ada", "Grace", "Linus"):
    asked.append((f"What did {customer} order?", f"SELECT product FROM orders WHERE customer = '{customer}'"))

with open("shop.csv", "w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["Question", "Schema", "SQL", "Database"])
    writer.writerows([question, SCHEMA, sql, "shop.sqlite"] for question, sql in asked)
