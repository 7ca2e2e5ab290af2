package contract

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

const bodyLimit = 102_400

// tooLong is a body above the limit.
var tooLong = strings.Repeat("x", bodyLimit+1)

// bodyRoutes are the routes where a body is due.
func (s *server) bodyRoutes() []string {
	return slices.DeleteFunc(s.routes(), func(route string) bool {
		return !slices.Contains(publicRoutes, route) && !slices.Contains(passwordRoutes, route)
	})
}

// publicRoutes take a body from anybody, passwordRoutes take one with the password of the caller.
var (
	publicRoutes = []string{
		"POST /auth/signup", "POST /auth/login", "POST /auth/password/forgot",
		"POST /auth/password/reset", "POST /auth/email/verify",
	}
	passwordRoutes = []string{"PUT /auth/password", "DELETE /auth/me", "PUT /auth/email"}
)

// posted sends this text as the body of a login.
func (s *server) posted(body string) *answer { return s.send(post("/auth/login").text(body)) }

// loginText is the JSON of a login with something more before its last brace.
func (c *client) loginText(more string) string {
	return fmt.Sprintf(`{"email":%q,"password":%q%s}`, c.email, c.password, more)
}

var bodyPromises = []promise{
	{"invalid_json is 400 for what is not one JSON object, and for wrong types", aURL,
		func(s *server) {
			c := s.signup()
			good := c.loginText("")
			s.posted(" \t\r\n" + good + " \t\r\n").ok()
			for _, body := range []string{
				"", " \n", "null", `"x"`, "1", "true", "[]", "[" + good + "]", `{"email":`,
				`{email:"a"}`, good[:len(good)-1], good + "x", good + "}", good + good,
				good + " null", good + "// x", "/**/" + good, c.loginText(","),
				"\xef\xbb\xbf" + good, `{'email':'a','password':'b'}`,
				c.loginText(`,"x":NaN`), c.loginText(`,"x":01`), c.loginText(",\"x\":\"\x01\""),
				c.loginText(`,"x":"\x"`), c.loginText(`,"x":[1,]`), c.loginText(`,"x":{`),
			} {
				s.posted(body).shouldBe("invalid_json", body)
			}
			for _, value := range []string{"1", "null", "{}", `["b"]`, "true", `{"x":"y"}`} {
				s.posted(`{"email":`+value+`,"password":"b"}`).shouldBe("invalid_json", value)
				s.posted(`{"email":"a","password":`+value+`}`).shouldBe("invalid_json", value)
			}
		}},
	{"a member of the body's own object given twice is invalid_json", aURL, func(s *server) {
		c := s.signup()
		for _, more := range []string{
			fmt.Sprintf(`,"password":%q`, c.password), fmt.Sprintf(`,"\u0065mail":%q`, c.email),
			`,"x":1,"x":1`, `,"x":1,"y":2,"\u0078":3`,
		} {
			s.posted(c.loginText(more)).shouldBe("invalid_json", more)
		}
	}},
	{"unknown members are ignored, and inside them only the syntax counts", aURL, func(s *server) {
		c := s.signup()
		for _, more := range []string{
			`,"role":"admin","x":null`, `,"x":{"a":1,"a":2}`, `,"x":[{"a":1,"a":2}]`,
			`,"x":{"email":1,"password":null}`, `,"x":{"y":[1,2.5e3,null,true,"s",{}]}`,
		} {
			s.posted(c.loginText(more)).shouldBe("", more)
		}
		s.posted(c.loginText(`,"x":{"a":1,"a"}`)).refused("invalid_json")
	}},
	{"invalid UTF-8 anywhere is invalid_json", aURL, func(s *server) {
		c := s.signup()
		for _, bad := range []string{"\xff", "\xc3\x28", "\xed\xa0\x80", "\xc0\x80"} {
			for _, body := range []string{
				`{"email":"a","password":"` + bad + `"}`, c.loginText(`,"x":"` + bad + `"`),
				c.loginText(`,"` + bad + `":1`), c.loginText(`,"x":[{"y":"` + bad + `"}]`),
			} {
				s.posted(body).shouldBe("invalid_json", body)
			}
		}
	}},
	{"members are matched with their exact case", aURL, func(s *server) {
		c := s.signup()
		login := c.loginText("")
		for _, name := range []string{"email", "password"} {
			capitals := strings.Replace(login, name, strings.ToUpper(name), 1)
			s.posted(capitals).refused("validation_failed").names(name)
		}
		// In another case it is an unknown member, and no second one of the same name.
		s.posted(c.loginText(`,"Email":"x","Password":5`)).ok()
		s.posted(strings.Replace(login, "email", `\u0065mail`, 1)).ok()
	}},
	{"body_too_large is 413 beyond 102,400 bytes; white space counts", aURL, func(s *server) {
		c := s.signup()
		login := c.loginText("")
		for size, code := range map[int]string{bodyLimit: "", bodyLimit + 1: "body_too_large"} {
			r := post("/auth/login").text(login + strings.Repeat(" ", size-len(login)))
			s.send(r).shouldBe(code, "declared")
			s.send(r.chunks()).shouldBe(code, "chunked")
		}
		for _, route := range s.bodyRoutes() {
			c.send(to(route).text(tooLong)).refused("body_too_large")
			c.send(to(route).text(tooLong).chunks()).refused("body_too_large")
		}
	}},
	{"a body declared too long is refused unread", aURL, func(s *server) {
		resp, err := s.raw(fmt.Sprintf("POST /auth/signup HTTP/1.1\r\nHost: %s\r\n"+
			"Content-Type: application/json\r\nX-Forwarded-For: %s\r\nContent-Length: %d\r\n\r\n",
			s.host(), newIP(), bodyLimit+1)) // and not one byte of it
		s.expect(err == nil && resp.StatusCode == 413, "got %v, %v, want 413", resp, err)
	}},
	{"unsupported_media_type is 415 for any type but application/json", aURL, func(s *server) {
		c := s.signup()
		login := post("/auth/login").text(c.loginText(""))
		for _, good := range []string{"application/json; charset=utf-8", "Application/JSON"} {
			s.send(login.typed(good)).shouldBe("", good)
		}
		for _, bad := range []string{
			"", ";", "text/plain", "application/x-www-form-urlencoded", "application/jsonp", "json",
			"multipart/form-data; boundary=x", "application/problem+json",
			"application/json, text/plain",
		} {
			s.send(login.typed(bad)).shouldBe("unsupported_media_type", bad)
		}
		for _, route := range s.bodyRoutes() {
			c.send(to(route).text("{}").typed("text/plain")).refused("unsupported_media_type")
		}
	}},
	{"no body at all is 415 where one is due, 400 if the type is there", aURL, func(s *server) {
		c := s.signup()
		for _, route := range s.bodyRoutes() {
			c.send(to(route)).refused("unsupported_media_type")
			c.send(to(route).typed("application/json")).refused("invalid_json")
		}
	}},
	{"request_timeout is 408 for a body that does not arrive, within 5 s", aURL, func(s *server) {
		c := s.signup()
		bodyRoutes := s.bodyRoutes()
		for _, a := range together(len(bodyRoutes), func(i int) *answer {
			return c.send(to(bodyRoutes[i]).text(`{"email":`).stalls())
		}) {
			a.refused("request_timeout")
			s.expect(a.took <= 6*time.Second, "%s took %v", a, a.took) // 1 s is the machine's
			s.expect(a.Close, "%s: the connection stays open", a)
		}
	}},
	{"refresh, logout and verification read no body and ask for no type", aURL, func(s *server) {
		c := s.signup()
		for _, kind := range []string{"application/json", "text/plain"} {
			refresh := post("/auth/refresh").cookie(c.refresh)
			c.take(s.send(refresh.text("{{ no JSON").typed(kind)).ok())
		}
		if slices.Contains(s.routes(), "POST /auth/email/verification") {
			c.send(post("/auth/email/verification").text("{{ no JSON").typed("text/plain")).ok()
		}
		c.send(post("/auth/logout").text("{{ no JSON").typed("text/plain")).ok()
	}},
}

var orderPromises = []promise{
	{"rate_limited comes before all but CORS", own, func(s *server) {
		s = s.start(env{"RATE_LIMIT_MAX": "1"})
		ip := newIP()
		s.send(get("/nowhere").ip(ip)).want(404)
		for _, r := range []request{
			get("/nowhere"), to("PATCH /auth/me"), get("/auth/me"), post("/auth/refresh"),
			evil(post("/auth/login")), post("/auth/login").text(tooLong),
		} {
			s.send(r.ip(ip)).refused("rate_limited")
		}
		s.send(post("/auth/login").from(frontend).ip(ip)).refused("rate_limited")
		s.send(post("/auth/login").preflight(frontend).ip(ip)).want(204)
	}},
	{"404 and 405, then 403 cross-origin, then 401, before all of the body", aURL, func(s *server) {
		s.send(evil(post("/nowhere"))).refused("not_found")
		s.send(evil(post("/auth/me"))).refused("method_not_allowed")
		s.send(evil(del("/healthz"))).refused("method_not_allowed")
		for _, r := range []request{put("/auth/password"), del("/auth/me")} {
			for _, body := range []string{"", "{", " " + tooLong} {
				s.send(evil(r.text(body).typed("text/plain"))).refused("cross_origin")
				s.send(r.text(body).typed("text/plain")).refused("missing_token")
			}
		}
		s.send(evil(post("/auth/login").text(tooLong))).refused("cross_origin")
	}},
	{"413 by the declared length, 415, 413 by what was read, 400", aURL, func(s *server) {
		login := post("/auth/login").text(tooLong)
		s.send(login.typed("text/plain")).refused("body_too_large")
		s.send(login.typed("text/plain").chunks()).refused("unsupported_media_type")
		for _, start := range []string{"", "{}", `{"email":1}`} {
			body := start + strings.Repeat(" ", bodyLimit+1)
			s.send(login.text(body).chunks()).refused("body_too_large")
		}
	}},
	{"too_many_attempts comes once the body is understood", own, func(s *server) {
		s = s.start(env{"LOGIN_LIMIT_MAX": "1"})
		c := s.signup()
		s.guess(c.email, c.ip).refused("invalid_credentials")
		c.tryLogin().refused("too_many_attempts")
		login := post("/auth/login")
		c.send(login.text(`{"email":"` + c.email + `",`)).refused("invalid_json")
		c.send(login.text(`{"email":"` + c.email + `"}`)).refused("validation_failed")
		c.send(login.text(c.loginText("")).typed("text/plain")).refused("unsupported_media_type")
	}},
}
