package main

import (
	"errors"
	"go/ast"
	"go/parser"
	"go/scanner"
	"go/token"
	"go/types"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"
)

const (
	// maxTokens bounds all production Go. A token is what go/scanner returns, comments and the
	// semicolons that it inserts at the ends of lines not counted. So there is nothing to gain by
	// putting more on a line, or by leaving a comment out.
	maxTokens = 18_000

	// maxColumns is as much of a line as a reviewer sees side by side with its older version. A tab
	// at the beginning counts four.
	maxColumns = 100

	// maxFunctionLines is about as much as one screen shows.
	maxFunctionLines = 60
)

// layout says of each production file which packages it may not import, as prefixes of their paths,
// and which of the other files it may not use.
var layout = map[string]struct {
	packages string
	files    string
}{
	"jwt.go": {
		packages: "net/http github.com/ golang.org/",
		files:    "ratelimit.go store.go middleware.go auth.go main.go",
	},
	"ratelimit.go": {
		packages: "net/http github.com/jackc/ golang.org/",
		files:    "jwt.go store.go middleware.go auth.go main.go",
	},
	"store.go": {
		packages: "net/http golang.org/",
		files:    "jwt.go ratelimit.go middleware.go auth.go main.go",
	},
	"middleware.go": {
		packages: "github.com/ golang.org/",
		files:    "auth.go main.go",
	},
	"auth.go": {
		packages: "github.com/",
		files:    "main.go",
	},
	"main.go": {},
}

// productionFiles returns the files of a pattern that are no tests, by their names.
func productionFiles(t *testing.T, pattern string) map[string]string {
	t.Helper()
	names, err := filepath.Glob(pattern)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		files[name] = string(data)
	}
	return files
}

// parseFiles parses the production Go.
func parseFiles(t *testing.T) (*token.FileSet, map[string]*ast.File) {
	t.Helper()
	fset := token.NewFileSet()
	files := map[string]*ast.File{}
	for name, source := range productionFiles(t, "*.go") {
		file, err := parser.ParseFile(fset, name, source, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		files[name] = file
	}
	return fset, files
}

// TestBudget holds that the production Go is the files of layout and no others, and how much there
// is of it.
func TestBudget(t *testing.T) {
	files := productionFiles(t, "*.go")
	for name := range layout {
		if files[name] == "" {
			t.Errorf("%s is missing", name)
		}
	}
	total := 0
	for name, source := range files {
		if _, known := layout[name]; !known {
			t.Errorf("%s is not in the design", name)
		}
		total += countTokens(source)
	}
	t.Logf("%d tokens of production Go", total)
	if total > maxTokens {
		t.Errorf("%d tokens of production Go, at most %d", total, maxTokens)
	}
}

func countTokens(source string) int {
	file := token.NewFileSet().AddFile("", -1, len(source))
	var s scanner.Scanner
	s.Init(file, []byte(source), nil, 0) // which leaves comments out
	for n := 0; ; n++ {
		switch _, tok, literal := s.Scan(); {
		case tok == token.EOF:
			return n
		case tok == token.SEMICOLON && literal != ";":
			n-- // the scanner has inserted it
		}
	}
}

func TestColumns(t *testing.T) {
	for _, pattern := range []string{"*.go", "*.lua"} {
		for name, source := range productionFiles(t, pattern) {
			for i, line := range strings.Split(source, "\n") {
				tabs := len(line) - len(strings.TrimLeft(line, "\t"))
				columns := utf8.RuneCountInString(line) + 3*tabs
				if columns > maxColumns {
					t.Errorf("%s:%d: %d columns, at most %d", name, i+1, columns, maxColumns)
				}
			}
		}
	}
}

// noImports leaves all other packages unknown, since only our own files matter here.
type noImports struct{}

func (noImports) Import(string) (*types.Package, error) { return nil, errors.New("not imported") }

// resolve returns which of the package's own top-level declarations each identifier means.
func resolve(fset *token.FileSet, files map[string]*ast.File) map[*ast.Ident]types.Object {
	var list []*ast.File
	for _, file := range files {
		list = append(list, file)
	}
	info := &types.Info{Uses: map[*ast.Ident]types.Object{}}
	config := types.Config{
		Importer: noImports{},
		Error:    func(error) {}, // each import is an error here
	}
	pkg, _ := config.Check("latchkey", fset, list, info)
	for id, object := range info.Uses {
		if object.Parent() != pkg.Scope() {
			delete(info.Uses, id)
		}
	}
	return info.Uses
}

func TestWhoMayUseWhom(t *testing.T) {
	fset, files := parseFiles(t)
	for name, file := range files {
		for _, spec := range file.Imports {
			path, _ := strconv.Unquote(spec.Path.Value)
			for prefix := range strings.FieldsSeq(layout[name].packages) {
				if strings.HasPrefix(path, prefix) {
					t.Errorf("%s imports %s", name, path)
				}
			}
		}
	}
	used := map[[2]string]bool{}
	for id, object := range resolve(fset, files) {
		user := fset.Position(id.Pos())
		owner := fset.Position(object.Pos()).Filename
		used[[2]string{user.Filename, owner}] = true
		if strings.Contains(" "+layout[user.Filename].files, " "+owner) {
			t.Errorf("%v uses %s of %s", user, id.Name, owner)
		}
	}
	// If these uses were not seen, the test would be blind.
	for _, uses := range [][2]string{
		{"main.go", "auth.go"},
		{"auth.go", "store.go"},
		{"auth.go", "jwt.go"},
		{"middleware.go", "store.go"},
	} {
		if !used[uses] {
			t.Errorf("no use of %s in %s was found", uses[1], uses[0])
		}
	}
}

// TestHouseRules holds that no function is too long or named init, that no package variable
// changes, that only main ends the process, that jwt.go has no clock, and that SQL is in store.go.
func TestHouseRules(t *testing.T) {
	fset, files := parseFiles(t)
	objects := resolve(fset, files)
	for name, file := range files {
		for _, decl := range file.Decls {
			function := ""
			if f, ok := decl.(*ast.FuncDecl); ok {
				function = f.Name.Name
			}
			begin := fset.Position(decl.Pos())
			n := fset.Position(decl.End()).Line - begin.Line + 1
			if function == "init" || function != "" && n > maxFunctionLines {
				t.Errorf("%v: %s is init, or has %d lines", begin, function, n)
			}
			for n := range ast.Preorder(decl) {
				if fault := houseRule(n, name, function, objects); fault != "" {
					t.Errorf("%v: %s", fset.Position(n.Pos()), fault)
				}
			}
		}
	}
}

// sqlForm matches the beginning of an SQL statement.
var sqlForm = regexp.MustCompile(
	`(?is)^\s*(SELECT\s|INSERT\s+INTO\s|UPDATE\s.*\sSET\s|DELETE\s+FROM\s)`)

// houseRule returns which of the rules a node breaks, "" if it breaks none.
func houseRule(n ast.Node, file, function string, objects map[*ast.Ident]types.Object) string {
	switch n := n.(type) {
	case *ast.AssignStmt:
		return changedVariable(objects, n.Lhs...)
	case *ast.IncDecStmt:
		return changedVariable(objects, n.X)
	case *ast.RangeStmt:
		return changedVariable(objects, n.Key, n.Value)
	case *ast.SelectorExpr:
		pkg, _ := n.X.(*ast.Ident)
		if pkg == nil {
			return ""
		}
		if pkg.Name == "os" && n.Sel.Name == "Exit" && (file != "main.go" || function != "main") {
			return "os.Exit outside main"
		}
		if pkg.Name == "time" && file == "jwt.go" &&
			slices.Contains([]string{"Now", "Since", "Until"}, n.Sel.Name) {
			return "the clock is a parameter"
		}
	case *ast.BasicLit:
		text, err := strconv.Unquote(n.Value)
		if err == nil && file != "store.go" && sqlForm.MatchString(text) {
			return "SQL outside store.go"
		}
	}
	return ""
}

// changedVariable names the package variable that an assignment to the targets changes. It is the
// first identifier in a target such as x, x.f, x[i] and *x.
func changedVariable(objects map[*ast.Ident]types.Object, targets ...ast.Expr) string {
	for _, target := range targets {
		if target == nil {
			continue // a range statement without a value
		}
		for n := range ast.Preorder(target) {
			id, isIdentifier := n.(*ast.Ident)
			if !isIdentifier {
				continue
			}
			if v, ok := objects[id].(*types.Var); ok {
				return "package variable " + v.Name() + " changes"
			}
			break
		}
	}
	return ""
}

// TestModule holds that the module requires three others directly, and replaces none.
func TestModule(t *testing.T) {
	data, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	direct := regexp.MustCompile(`(?m)^(?:require)?\s+(\S+) v\S+$`).FindAllSubmatch(data, -1)
	got := ""
	for _, match := range direct {
		got += string(match[1]) + " "
	}
	const want = "github.com/jackc/pgx/v5 github.com/redis/go-redis/v9 golang.org/x/crypto "
	if got != want || strings.Contains(string(data), "replace") {
		t.Errorf("go.mod requires %s directly, want %s", got, want)
	}
}
