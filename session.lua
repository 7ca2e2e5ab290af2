-- What is done to sessions in Redis: each script is atomic, on one hash slot, in one round trip. Every script is sent
-- with this head: Redis' own clock in milliseconds, one clock for all replicas; and kill(token, exp), which puts a
-- refresh token on the blacklist, with the time it died, until it would have expired. The key is made from the
-- session's, so it is in the same slot.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local at = math.floor(now / 1000)
local function kill(token, exp)
  redis.call('SET', string.gsub(KEYS[1], '^session', 'blacklist') .. ':' .. token, now, 'EXAT', exp)
end

-- script: index
-- KEYS: user-sessions. ARGV: session id, seconds until it expires.
-- Enters the session in its user's index, drops what has expired from it and keeps it as long as the longest.
-- Returns now.
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', at)
redis.call('ZADD', KEYS[1], at + ARGV[2], ARGV[1])
redis.call('EXPIREAT', KEYS[1], redis.call('ZRANGE', KEYS[1], -1, -1, 'WITHSCORES')[2])
return now

-- script: start
-- KEYS: session. ARGV: user, token, now, iat, exp, ip, user agent, digest of the password hash.
redis.call('HSET', KEYS[1], 'user', ARGV[1], 'token', ARGV[2], 'created', ARGV[3], 'used', ARGV[3],
  'iat', ARGV[4], 'exp', ARGV[5], 'ip', ARGV[6], 'agent', ARGV[7], 'password', ARGV[8])
return redis.call('EXPIREAT', KEYS[1], ARGV[5])

-- script: rotate
-- KEYS: session, blacklist entry of the token shown. ARGV: user, token shown, next token, digest of the password hash,
-- seconds of a refresh token, seconds of a session, leeway in ms, '1' to resend, ip, user agent.
-- Returns what came of it and, where there is one, the session's token with its iat and exp.
--
-- The session alone says which token is alive, so a lost blacklist entry revives nothing. The entry, else the
-- session's memory of its last exchange, says when a dead one was exchanged.
local s = redis.call('HMGET', KEYS[1], 'user', 'token', 'iat', 'exp', 'created', 'password', 'previous', 'exchanged')
if s[1] ~= ARGV[1] then return {'gone'} end
local token, iat, exp = s[2], tonumber(s[3]), tonumber(s[4])
local bound = string.find(s[6], ARGV[4], 1, true)

if token ~= ARGV[2] then
  local exchanged = redis.call('GET', KEYS[2]) or (s[7] == ARGV[2] and s[8])
  if not exchanged or now - exchanged > tonumber(ARGV[7]) then
    kill(token, exp)
    redis.call('DEL', KEYS[1])
    return {'theft'}
  end
  if ARGV[8] ~= '1' or s[7] ~= ARGV[2] then return {'reused'} end
  if bound then return {'resent', token, iat, exp} end
end

local till = math.min(at + ARGV[5], math.floor(s[5] / 1000) + ARGV[6])
kill(token, exp)
if not bound or till <= at then
  redis.call('DEL', KEYS[1])
  return {'gone'}
end
redis.call('HSET', KEYS[1], 'token', ARGV[3], 'iat', at, 'exp', till, 'used', now,
  'previous', token, 'exchanged', now, 'ip', ARGV[9], 'agent', ARGV[10])
redis.call('EXPIREAT', KEYS[1], till)
return {'rotated', ARGV[3], at, till}

-- script: revoke
-- KEYS: session. ARGV: user. Ends the session if it is that user's; returns 1 if so.
local s = redis.call('HMGET', KEYS[1], 'user', 'token', 'exp')
if s[1] ~= ARGV[1] then return 0 end
kill(s[2], s[3])
return redis.call('DEL', KEYS[1])

-- script: rebind
-- KEYS: session. ARGV: user, digest that it must be bound to or '', digests that it shall be bound to.
local s = redis.call('HMGET', KEYS[1], 'user', 'password')
if s[1] ~= ARGV[1] or not string.find(s[2], ARGV[2], 1, true) then return 0 end
return redis.call('HSET', KEYS[1], 'password', ARGV[3])
