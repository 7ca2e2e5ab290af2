-- schema.sql is the schema as migrations, in order. Each begins at its marker line and is applied
-- once. A migration that has been applied is never edited, since its checksum is on record. It is
-- followed by another one.

-- migration: 0001 users
-- As Drizzle makes it for the backend that this server replaces; a table that is there is adopted.
CREATE TABLE IF NOT EXISTS users (
    id            uuid        PRIMARY KEY DEFAULT gen_random_uuid(),
    email         text        NOT NULL UNIQUE,
    password_hash text        NOT NULL,
    created_at    timestamptz NOT NULL DEFAULT now(),
    updated_at    timestamptz NOT NULL DEFAULT now()
);
-- Fails here, at the start, if the table that is there is another's.
SELECT id = gen_random_uuid(), email || password_hash, created_at < updated_at FROM users LIMIT 0;

-- migration: 0002 email without case
-- One account per address however it is capitalised. Collation "C" lowers ASCII only, as the server does.
-- An adopted table may have rows that differ only by case: which of them goes is for its owner to say.
DO $$
BEGIN
    IF EXISTS (SELECT FROM users GROUP BY lower(email COLLATE "C") HAVING count(*) > 1) THEN
        RAISE EXCEPTION 'users has rows whose email differs only by case; list them with: %',
            'SELECT lower(email COLLATE "C"), array_agg(id), array_agg(email) FROM users GROUP BY 1 HAVING count(*) > 1;';
    END IF;
END $$;
CREATE UNIQUE INDEX users_email_lower_key ON users (lower(email COLLATE "C"));

-- migration: 0003 verified emails and disabled users
-- Both columns are null at first. A backend that does not know them goes on working beside.
ALTER TABLE users
    ADD COLUMN IF NOT EXISTS email_verified_at timestamptz,
    ADD COLUMN IF NOT EXISTS disabled_at       timestamptz;
-- Fails here, at the start, if the table had such a column of another type.
SELECT email_verified_at < now(), disabled_at < now() FROM users LIMIT 0;
