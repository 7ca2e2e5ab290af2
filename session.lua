-- What is done to a session in Redis: each call is atomic, on one hash slot, in one round trip.
-- ARGV: what to do, then as said below. KEYS: the session's hash; other keys are made from it, in the same slot.

-- Redis' own clock: one for all replicas. Milliseconds; at in seconds.
local time = redis.call('TIME')
local at, now = tonumber(time[1]), time[1] * 1000 + math.floor(time[2] / 1000)

-- KEYS: not a session but the user's index of them. ARGV: session id, seconds until it expires. Enters the session,
-- drops what has expired and keeps the index as long as the longest.
if ARGV[1] == 'index' then
  redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', at)
  redis.call('ZADD', KEYS[1], at + ARGV[3], ARGV[2])
  return redis.call('EXPIREAT', KEYS[1], redis.call('ZRANGE', KEYS[1], -1, -1, 'WITHSCORES')[2])
end

-- 'start' and, further down, 'rotate'. ARGV: user, digest of the password hash, seconds of a refresh token, seconds of a
-- session, ip, user agent, token that the session shall honour. Return what came of it and that token's iat and exp.
if ARGV[1] == 'start' then
  local till = at + math.min(ARGV[4], ARGV[5])
  redis.call('HSET', KEYS[1], 'user', ARGV[2], 'password', ARGV[3], 'ip', ARGV[6], 'agent', ARGV[7], 'token', ARGV[8],
    'created', now, 'used', now, 'iat', at, 'exp', till)
  redis.call('EXPIREAT', KEYS[1], till)
  return {'started', ARGV[8], tostring(at), tostring(till)}
end

-- The rest is about a session that is there and, ARGV: user, that user's.
local s = {}
local fields = redis.call('HGETALL', KEYS[1])
for i = 1, #fields, 2 do s[fields[i]] = fields[i + 1] end
if s.user ~= ARGV[2] then return {'ended'} end

-- Returns what its owner may see of it.
if ARGV[1] == 'read' then
  return {s.created, s.used, s.ip, s.agent}
end

-- ARGV: digest that it must be bound to or '', digests that it shall be bound to as well. The last eight are kept, all
-- of one password: a refresh that read PostgreSQL before two rehashes goes on.
if ARGV[1] == 'rebind' then
  if string.find(s.password, ARGV[3], 1, true) then
    redis.call('HSET', KEYS[1], 'password', string.sub(s.password .. ' ' .. ARGV[4], -8 * 17 + 1))
  end
  return {'bound'}
end

-- The blacklist remembers a dead refresh token, with the time it died, until it would have expired.
local function blacklist(token) return string.gsub(KEYS[1], '^session', 'blacklist') .. ':' .. token end
local function kill() redis.call('SET', blacklist(s.token), now, 'EXAT', s.exp) end
local function finish(outcome)
  kill()
  redis.call('DEL', KEYS[1])
  return {outcome}
end

-- Ends it.
if ARGV[1] == 'revoke' then
  return finish('revoked')
end

-- 'rotate'. ARGV: as for 'start', and the token shown, leeway in ms, '1' to resend.
--
-- The session alone says which token is alive, so a lost blacklist entry revives nothing. The entry, else the
-- session's memory of its last exchange, says when a dead one was exchanged.
local bound = string.find(s.password, ARGV[3], 1, true)
if s.token ~= ARGV[9] then
  local last = s.previous == ARGV[9]
  local exchanged = tonumber(redis.call('GET', blacklist(ARGV[9])) or (last and s.exchanged))
  if not exchanged or now - exchanged > tonumber(ARGV[10]) then return finish('theft') end
  if ARGV[11] ~= '1' or not last then return {'reused'} end
  if bound then return {'resent', s.token, s.iat, s.exp} end
end
local till = math.min(at + ARGV[4], math.floor(s.created / 1000) + ARGV[5])
if not bound or till <= at then return finish('ended') end
kill()
redis.call('HSET', KEYS[1], 'token', ARGV[8], 'iat', at, 'exp', till, 'used', now,
  'previous', s.token, 'exchanged', now, 'ip', ARGV[6], 'agent', ARGV[7])
redis.call('EXPIREAT', KEYS[1], till)
return {'rotated', ARGV[8], tostring(at), tostring(till)}
