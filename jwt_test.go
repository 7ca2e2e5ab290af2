package main

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/json"
	"errors"
	"hash"
	"strings"
	"testing"
	"time"
)

const tokenHeader = `{"alg":"HS256","typ":"JWT"}`

var (
	testKeys = keys{current: []byte("the key that signs and verifies!")}
	testNow  = time.Unix(1_800_000_000, 0)
)

func testClaims() claims {
	return claims{
		UserID:    "u-1",
		Email:     "user@example.com",
		IssuedAt:  testNow.Unix(),
		ExpiresAt: testNow.Unix() + 900,
		Subject:   "u-1",
		SessionID: "s-1",
		TokenID:   "t-1",
	}
}

func encode(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }

// signText returns a token of "header.payload" with its right signature. It shares no code with
// what it tests.
func signText(signed string) string { return signWith(sha256.New, signed) }

func signWith(newHash func() hash.Hash, signed string) string {
	mac := hmac.New(newHash, testKeys.current)
	mac.Write([]byte(signed))
	return signed + "." + encode(string(mac.Sum(nil)))
}

// craft returns a token of any header and payload with its right signature.
func craft(header, payload string) string {
	return signText(encode(header) + "." + encode(payload))
}

func checkVerify(t *testing.T, k keys, token string, want error) {
	t.Helper()
	got, err := k.verify(token, testNow)
	if !errors.Is(err, want) {
		t.Errorf("verify(%q) = %v, want %v", token, err, want)
	}
	if want != nil && got != (claims{}) {
		t.Errorf("verify(%q) refused and returned claims: %+v", token, got)
	}
}

func TestVerifyForgeries(t *testing.T) {
	good := testKeys.sign(testClaims())
	parts := strings.Split(good, ".")
	header, body, sig := parts[0], parts[1], parts[2]
	decoded, _ := base64.RawURLEncoding.DecodeString(body)
	payload := string(decoded)
	if craft(tokenHeader, payload) != good {
		t.Fatal("craft differs from sign, so the forgeries below would prove nothing")
	}
	otherBody := encode(strings.ReplaceAll(payload, "u-1", "u-2"))
	forgeries := []string{
		".", "..", "." + good, good + ".", " " + good, good + " ", good + "\n", `"` + good + `"`,
		"." + body + "." + sig, header + ".." + sig, header + "." + body, header + "." + body + ".",
		header + "." + otherBody + "." + sig,
		craft(tokenHeader, ""),
	}
	for i := range good {
		forgeries = append(forgeries, good[:i])
	}
	for _, alg := range []string{"none", "None", "NONE", "nOnE", "", "RS256", "ES256", "hs256"} {
		other := `{"alg":"` + alg + `","typ":"JWT"}`
		forgeries = append(forgeries, encode(other)+"."+body+".", craft(other, payload))
	}
	forgeries = append(forgeries,
		signWith(sha512.New, encode(`{"alg":"HS512","typ":"JWT"}`)+"."+body),
		signWith(sha512.New, header+"."+body))
	for _, other := range []string{
		``, `null`, `{}`, tokenHeader + " ", tokenHeader + "\n",
		`{"typ":"JWT","alg":"HS256"}`, `{"alg": "HS256","typ":"JWT"}`, `{"alg":"HS256"}`,
		`{"alg":"HS256","typ":"jwt"}`, `{"alg":"HS256","alg":"HS256","typ":"JWT"}`,
		`{"\u0061lg":"HS256","typ":"JWT"}`, `{"alg":"HS256","typ":"JWT","kid":"1"}`,
		`{"alg":"HS256","typ":"JWT","crit":["exp"]}`, `{"alg":"HS256","typ":"JWT","jwk":{}}`,
	} {
		forgeries = append(forgeries, craft(other, payload))
	}
	for _, forgery := range forgeries {
		checkVerify(t, testKeys, forgery, errTokenInvalid)
	}
}

// TestVerifyNonCanonicalBase64 checks that a token can be written in one way only. A second way
// would slip past whoever compares tokens.
func TestVerifyNonCanonicalBase64(t *testing.T) {
	// The payloads of these emails leave no, two and four bits unused in their last character.
	for _, email := range []string{"user@example.com", "user1@example.com", "user12@example.com"} {
		c := testClaims()
		c.Email = email
		good := testKeys.sign(c)
		checkVerify(t, testKeys, good, nil)
		parts := strings.Split(good, ".")
		header, body, sig := parts[0], parts[1], parts[2]
		spellings := []string{
			good + "=",
			header + "." + body + "." + sig[:8] + "\n" + sig[8:],
			header + "." + body + "." + strings.NewReplacer("-", "+", "_", "/").Replace(sig) + "=",
			signText(header + "\n." + body),
		}
		others := append(sameBytes(body), "\n"+body, body+"\n", body+"=", body+"==", body+"A",
			body[:8]+"\n"+body[8:], body[:8]+"\r"+body[8:], body[:8]+" "+body[8:])
		for _, other := range others {
			spellings = append(spellings, signText(header+"."+other))
		}
		for _, other := range sameBytes(sig) {
			spellings = append(spellings, header+"."+body+"."+other)
		}
		for _, spelling := range spellings {
			checkVerify(t, testKeys, spelling, errTokenInvalid)
		}
	}
}

// sameBytes returns the other texts that a lenient decoder takes for the same bytes.
func sameBytes(text string) []string {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	want, _ := base64.RawURLEncoding.DecodeString(text)
	var others []string
	for _, last := range alphabet {
		other := text[:len(text)-1] + string(last)
		got, _ := base64.RawURLEncoding.DecodeString(other)
		if other != text && string(got) == string(want) {
			others = append(others, other)
		}
	}
	return others
}

func TestVerifyClaims(t *testing.T) {
	const whole = `{"userId":"u-1","email":"user@example.com","iat":1800000000,` +
		`"sub":"u-1","sid":"s-1","jti":"t-1","exp":1800000900}`
	check := func(want error, old string, news ...string) {
		t.Helper()
		for _, new := range news {
			payload := strings.Replace(whole, old, new, 1)
			checkVerify(t, testKeys, craft(tokenHeader, payload), want)
		}
	}
	check(nil, `1800000900}`, `1800000900}`, `1800000001}`, `9223372036854775807}`)
	check(errTokenExpired, `1800000900}`, `1800000000}`, `1}`, `-1}`) // on exp, not only after it
	check(errTokenInvalid, `1800000900}`, `9223372036854775808}`, `0}`, `1800000900.0}`,
		`1800000900.5}`, `18000009e2}`, `"1800000900"}`, `null}`, `true}`, `[1800000900]}`, `}`)
	check(errTokenInvalid, `,"exp":1800000900`, ``)

	check(nil, `}`, `,"nbf":1800000000}`, `,"other":{"y":[1,2,{}]}}`)
	check(errTokenInvalid, `}`, `,"nbf":1800000001}`, `,"nbf":"1"}`, `,"nbf":1.5}`)
	check(errTokenInvalid, `1800000900}`, `1,"nbf":1800000001}`)

	check(nil, `"iat":1800000000`, `"iat":1900000000`) // clocks differ
	check(errTokenInvalid, `"iat":1800000000`, `"iat":"1800000000"`)
	check(errTokenInvalid, `"userId":"u-1",`, ``, `"userId":"U-1",`, `"userId":"",`)
	check(errTokenInvalid, `"sub":"u-1",`, ``, `"sub":"u-2",`)
	check(errTokenInvalid, `"sid":"s-1",`, ``, `"sid":"",`, `"sid":1,`)
	check(errTokenInvalid, `"jti":"t-1",`, ``, `"jti":null,`)
	check(errTokenInvalid, `"user@example.com"`, `["user@example.com"]`)
	check(errTokenInvalid, whole,
		whole+"x", whole+whole, "\ufeff"+whole, "["+whole+"]", "null", "{}")
}

// FuzzVerify checks that verify accepts nothing but what sign makes. To get past the signature, it
// also signs what the fuzzer wrote. If verify accepts that, the claims must pass in any other
// reader too.
func FuzzVerify(f *testing.F) {
	good := testKeys.sign(testClaims())
	for _, seed := range []string{
		good, good[:len(good)-1], "..", strings.Replace(good, ".", ".\n", 1),
		craft(`{"alg":"none"}`, `{}`), keys{}.sign(testClaims()),
		encode(tokenHeader) + "." + encode(`{"exp":18e8}`) + ".",
		encode(tokenHeader) + "." + encode(`{"userId":"u","sub":"u","sid":"s","jti":"j",`+
			`"exp":1800000900,"nbf":1}`) + ".",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, token string) {
		if c, err := testKeys.verify(token, testNow); err == nil && testKeys.sign(c) != token {
			t.Fatalf("accepted %q, which sign did not make", token)
		}
		signed := token[:max(0, strings.LastIndexByte(token, '.'))]
		got, err := testKeys.verify(signText(signed), testNow)
		if err != nil {
			return
		}
		payload, ok := strings.CutPrefix(signed, encode(tokenHeader)+".")
		data, err := base64.RawURLEncoding.DecodeString(payload)
		if !ok || err != nil || encode(string(data)) != payload {
			t.Fatalf("accepted %q: not our header, or not canonical base64url", signed)
		}
		var want claims
		if err := json.Unmarshal(data, &want); err != nil || got != want {
			t.Fatalf("read %+v from %q (%v)", got, data, err)
		}
		if got.UserID == "" || got.UserID != got.Subject || got.ExpiresAt <= testNow.Unix() {
			t.Fatalf("accepted %q", data)
		}
	})
}
