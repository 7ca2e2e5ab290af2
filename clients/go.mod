module latchkey/clients

go 1.26.0
