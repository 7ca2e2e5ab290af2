-- Counters with a window, in Redis: each call is atomic, on one hash slot, in one round trip.
-- ARGV: what to do, window in seconds, then as said below.

-- The milliseconds that a counter's window still lasts. A window begins when none is open, and anew where the key has
-- lost its TTL, or it would refuse for ever.
local function left(key)
  local ms = redis.call('PTTL', key)
  if ms < 0 then
    ms = ARGV[2] * 1000
    redis.call('PEXPIRE', key, ms)
  end
  return ms
end

-- KEYS: counter. Counts one and returns the count and the milliseconds left.
if ARGV[1] == 'request' then
  return {redis.call('INCR', KEYS[1]), left(KEYS[1])}
end

-- The other two: KEYS: failures on an account from one IP, from all.
local counts = {tonumber(redis.call('GET', KEYS[1]) or 0), tonumber(redis.call('GET', KEYS[2]) or 0)}

-- ARGV: maximum from one IP, 0 for none; from all it is ten times that. Counts both and returns 0, or neither and
-- returns the milliseconds to wait.
if ARGV[1] == 'attempt' then
  if ARGV[3] == '0' then return 0 end
  local wait = 0
  for i, max in ipairs({tonumber(ARGV[3]), ARGV[3] * 10}) do
    if counts[i] >= max then wait = math.max(wait, left(KEYS[i]), 1) end
  end
  for i = 1, wait == 0 and 2 or 0 do
    redis.call('INCR', KEYS[i])
    left(KEYS[i])
  end
  return wait
end

-- 'give back': ARGV: '1' to clear the count from this IP. Takes one attempt back.
for i = 1, 2 do
  if counts[i] == 1 or (i == 1 and ARGV[3] == '1') then
    redis.call('DEL', KEYS[i])
  elseif counts[i] > 1 then
    redis.call('DECR', KEYS[i])
  end
end
return 0
